"""Text from a model, one token at a time.

    generate(folder, prompts, ...)     texts, by an exported folder
    generate_ids(model, ids, ...)      token ids, by any model with the protocol's forward; also while it trains
    next_token(logits, ...)            greedy at temperature 0, else drawn from softmax(logits / temperature)

A prompt is read as [bos] + its tokens, as every document was in training; what is added ends at eos.

The surprise: there is no cache of keys and values. Each token is a forward pass over all before it, which for samples
of a hundred tokens costs seconds and keeps the decoder readable.
"""

from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from conf.refusal import BadRequest
from trainer.export import load_export, special_ids


def generate(
    model_folder: str,
    prompts: list[str],
    max_new_tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
    *,
    top_k: int | None = None,
) -> list[str]:
    """Continue each prompt; returns the texts that were added, without the prompts, in their order.

    The same seed gives the same texts, and a prompt's text does not depend on the other prompts.
    """
    check(max_new_tokens, temperature, top_k)
    model = load_export(model_folder)
    tokenizer = Tokenizer.from_file(f"{model_folder}/tokenizer.json")
    tokenizer.encode_special_tokens = True  # a prompt that spells <|eos|> is text, as it was in training
    special = special_ids(model_folder)
    texts = []
    for prompt in prompts:
        ids = [special["bos_token_id"], *tokenizer.encode(prompt, add_special_tokens=False).ids]
        added = generate_ids(model, ids, max_new_tokens, temperature, seed, eos_id=special["eos_token_id"], top_k=top_k)
        texts.append(added_text(tokenizer, ids, added))
    return texts


def added_text(tokenizer: Tokenizer, ids: list[int], added: list[int]) -> str:
    """The text of `added` after `ids`: decoded together, for some tokenizers spell the first token of a text apart."""
    before, whole = tokenizer.decode(ids), tokenizer.decode([*ids, *added])
    return str(whole[len(before) :] if whole.startswith(before) else tokenizer.decode(added))


def check(max_new_tokens: int, temperature: float, top_k: int | None) -> None:
    """Refuse amounts that cannot be."""
    if max_new_tokens < 0:
        raise BadRequest(f"max_new_tokens={max_new_tokens}: must be 0 or more")
    if not temperature >= 0:
        raise BadRequest(f"temperature={temperature}: must be 0 (always the likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise BadRequest(f"top_k={top_k}: must be 1 or more; leave it out to draw from all tokens")


def generate_ids(
    model: nn.Module,
    ids: list[int],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    *,
    eos_id: int | None = None,
    top_k: int | None = None,
) -> list[int]:
    """The tokens the model adds to `ids`, up to and without eos.

    Beyond the model's `max_positions` only the last ones are read, as positions from 0. Under ZeRO-3 every rank must
    call this with the same arguments, for a forward pass gathers the weights from all of them.
    """
    check(max_new_tokens, temperature, top_k)
    device = next(model.parameters()).device
    window = longest_context(model)
    draw = torch.Generator().manual_seed(seed)
    seen = list(ids)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            logits = model(torch.tensor([seen[-window:]], device=device))[0, -1]
            token = next_token(logits.float().cpu(), temperature, top_k, draw)
            if token == eos_id:
                break
            seen.append(token)
    return seen[len(ids) :]


def longest_context(model: nn.Module) -> int:
    """How many tokens the model reads at once; an engine's wrapper is looked through."""
    config: Any = getattr(getattr(model, "module", model), "config", None)
    return int(getattr(config, "max_positions", 1 << 30))


def next_token(logits: Tensor, temperature: float, top_k: int | None, draw: torch.Generator) -> int:
    """One token id from the logits [V] of its place."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < logits.shape[0]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial(torch.softmax(logits.double() / temperature, dim=-1), 1, generator=draw))


def sample_texts(
    model_folder: str, prompts: list[str], max_new_tokens: int, seed: int, temperature: float = 0.8
) -> list[dict[str, str]]:
    """Samples for a person to read, `[{"prompt", "text"}, ...]`; without prompts one that begins from nothing."""
    asked = prompts or [""]
    # Each prompt draws from its own seed: a young model hardly looks at the prompt, and would say the same to all.
    return [
        {"prompt": prompt, "text": generate(model_folder, [prompt], max_new_tokens, temperature, seed + number)[0]}
        for number, prompt in enumerate(asked)
    ]
