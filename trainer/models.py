"""Models by name: a model is anything with the protocol's `forward`.

    forward(input_ids [R, L], labels=None, position_ids=None, cu_seqlens=None)
        with labels      the SUM of token losses over labels that are not -100, a scalar
        without labels   logits [R, L, V]

`build_model` looks the name up in `conf.registry.MODELS`, calls `build(config, vocab_size)`, sets the initial weights
and gives the model the attributes `config`, `vocab_size` and `loss_chunk_tokens`. A model may also have

    initial_std(name) -> float           the standard deviation its matrices start with
    to_hugging_face(state) -> (config, state)    for an export that Transformers can load
"""

import torch
from torch import nn

from conf.refusal import BadRequest
from conf.registry import MODELS
from conf.schema import Model, Run
from trainer import decoder, objectives  # noqa: F401 (they register "decoder" and "causal_lm")
from trainer.initial import initialize


def build_model(run: Run, vocab_size: int) -> nn.Module:
    """The model of a run with its initial weights, in fp32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.run.seed)
        model = bare_model(run.model, vocab_size)
    initialize(model, run.run.seed)
    model.loss_chunk_tokens = run.train.loss_chunk_tokens  # type: ignore[assignment]
    return model


def bare_model(config: Model, vocab_size: int) -> nn.Module:
    """The registered model `config.name`, its weights not yet set; raises ValueError for what is not a model."""
    model = MODELS.get(config.name)(config, vocab_size)
    if not isinstance(model, nn.Module):
        raise BadRequest(
            f"model.name={config.name}: its builder returned {type(model).__name__}, not a torch.nn.Module\n"
            "register a function or class that takes (config, vocab_size) and returns the module"
        )
    model.config, model.vocab_size = config, vocab_size  # type: ignore[assignment]
    return model


def count_parameters(model: nn.Module) -> int:
    """Numbers that are trained; shared ones count once."""
    return sum(p.numel() for p in model.parameters())


def flops_per_token(config: Model, vocab_size: int, row_tokens: int) -> int:
    """Floating point operations of forward and backward per token of the in-tree decoder, as MFU counts them.

    6 for each parameter that multiplies (an embedding that is only looked up does not) and 12 * layers * width * row
    length for the attention scores (Chowdhery et al., PaLM, 2022, appendix B: neither causality nor documents shorter
    than a row are taken off).
    """
    head_width = config.width // config.heads
    attention = 2 * config.width * config.width + 2 * config.width * config.kv_heads * head_width
    layer = attention + 3 * config.width * config.ffn_width + 2 * config.width
    multiplying = config.layers * layer + config.width + vocab_size * config.width
    return 6 * multiplying + 12 * config.layers * config.width * row_tokens
