"""A trained model as a Hugging Face folder, and such a folder as our model again.

    export_hf     full fp32 tensors + tokenizer folder -> export/   (config, weights, tokenizer, model card)
    load_export   export/ or any Llama folder -> the model, ready to evaluate and to generate

The in-tree decoder is exported as a Llama, whose parameter names and layouts it has: nothing is renamed or permuted.
A model of another package is exported as its own `to_hugging_face(state)` says; without that method the folder has its
tensors under their own names and only zeroray reads it. `zeroray.json` holds the typed model config for that.

Only data is read back, JSON and safetensors; a config that names code is not followed.

The surprise: two folders cannot be renamed over one another, so the older export stands aside under `export.old-...`
for the time of one rename; where a kill leaves it there, the next export puts it back before it begins.
"""

import dataclasses
import glob
import os
import shutil
import uuid
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from conf.identity import plain
from conf.refusal import BadRequest
from conf.schema import Attention, Model
from data_pipeline.store import fsync_folder, read_json, write_bytes, write_json
from trainer.decoder import Decoder
from trainer.models import bare_model

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
OWN_CONFIG = "zeroray.json"
OWN_VERSION = 1


def export_hf(
    config: Model,
    vocab_size: int,
    state: dict[str, Tensor],
    tokenizer_folder: str,
    out_folder: str,
    *,
    run_info: dict[str, Any] | None = None,
) -> None:
    """Write the model to `out_folder`, whole or not at all; `run_info` goes into the model card.

    `state` maps parameter names to full tensors. Raises ValueError when it is not the model's.
    """
    restore_older(out_folder)
    hf_config, tensors = hugging_face(config, vocab_size, state)
    special = special_ids(tokenizer_folder)
    temporary = f"{out_folder}.tmp-{uuid.uuid4().hex[:12]}"
    os.makedirs(temporary)
    try:
        write_tensors(f"{temporary}/model.safetensors", tensors)
        for name in TOKENIZER_FILES:
            if os.path.exists(f"{tokenizer_folder}/{name}"):
                copy_file(f"{tokenizer_folder}/{name}", f"{temporary}/{name}")
        if hf_config is not None:
            write_json(f"{temporary}/config.json", {**hf_config, **special})
            write_json(f"{temporary}/generation_config.json", special)
        own = {"version": OWN_VERSION, "model": plain(config), "vocab_size": vocab_size}
        write_json(f"{temporary}/{OWN_CONFIG}", own)
        write_bytes(
            f"{temporary}/README.md", model_card(config, vocab_size, tensors, hf_config, run_info or {}).encode()
        )
        swap(temporary, out_folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_tensors(path: str, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file durably, straight from the tensors' memory."""
    save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def copy_file(source: str, target: str) -> None:
    """Copy a small file durably."""
    with open(source, "rb") as file:
        write_bytes(target, file.read())


def swap(new: str, out_folder: str) -> None:
    """Put the folder `new` in the place of `out_folder`, which is missing only between the two renames."""
    parent = os.path.dirname(os.path.abspath(out_folder))
    fsync_folder(new)
    older = f"{out_folder}.old-{uuid.uuid4().hex[:12]}"
    if os.path.isdir(out_folder):
        os.rename(out_folder, older)
    os.rename(new, out_folder)
    fsync_folder(parent)
    shutil.rmtree(older, ignore_errors=True)


def restore_older(out_folder: str) -> None:
    """Undo and clear away what a killed export left beside `out_folder`."""
    left = glob.glob(f"{glob.escape(out_folder)}.old-*")
    if left and not os.path.isdir(out_folder):
        os.rename(left.pop(), out_folder)
    for folder in [*left, *glob.glob(f"{glob.escape(out_folder)}.tmp-*")]:
        shutil.rmtree(folder)


def hugging_face(
    config: Model, vocab_size: int, state: dict[str, Tensor]
) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """The Transformers config (None when it has no such model) and the tensors under the names it uses."""
    with torch.device("meta"):  # shapes and methods only: no memory
        model = bare_model(config, vocab_size)
    check_state(model, state)
    convert = getattr(model, "to_hugging_face", None)
    if convert is not None:
        hf_config, tensors = convert(state)
        return dict(hf_config), dict(tensors)
    own = {name: state[name] for name, _ in model.named_parameters()}
    own |= {name: state[name] for name in persistent_buffers(model)}
    return (llama_config(config, vocab_size) if isinstance(model, Decoder) else None), own


def persistent_buffers(model: nn.Module) -> set[str]:
    """Names of the buffers that belong to the model's state."""
    return set(model.state_dict()) - {name for name, _ in model.named_parameters(remove_duplicate=False)}


def check_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Raise ValueError naming the tensors that are missing or of another shape than the model's."""
    wanted = dict(model.named_parameters()) | {name: model.get_buffer(name) for name in persistent_buffers(model)}
    wrong = [f"{n} is missing" for n in wanted if n not in state]
    wrong += [
        f"{n} is {list(state[n].shape)}, not {list(t.shape)}"
        for n, t in wanted.items()
        if n in state and state[n].shape != t.shape
    ]
    if wrong:
        raise ValueError(f"these weights are not this model's: {'; '.join(wrong[:5])}")


def llama_config(config: Model, vocab_size: int) -> dict[str, Any]:
    """`config.json` of the decoder."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.width // config.heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # Transformers 4 reads this, 5 the next
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def special_ids(folder: str) -> dict[str, int]:
    """`bos_token_id`, `eos_token_id` and, where there is one, `pad_token_id` of a tokenizer folder."""
    config = read_json(f"{folder}/tokenizer_config.json")
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    found = {}
    for kind in ("bos", "eos", "pad"):
        token = config.get(f"{kind}_token")
        name = token["content"] if isinstance(token, dict) else token
        number = tokenizer.token_to_id(name) if name is not None else None
        if number is not None:
            found[f"{kind}_token_id"] = number
    for kind in ("bos_token", "eos_token"):
        if f"{kind}_id" not in found:
            raise BadRequest(f"{folder}/tokenizer_config.json: names no {kind} that tokenizer.json has")
    return found


def model_card(
    config: Model,
    vocab_size: int,
    tensors: dict[str, Tensor],
    hf_config: dict[str, Any] | None,
    run_info: dict[str, Any],
) -> str:
    """README.md of the export: what it is, how to load it, and the facts the run gave."""
    loading = (
        'model = AutoModelForCausalLM.from_pretrained(".")\ntokenizer = AutoTokenizer.from_pretrained(".")'
        if hf_config is not None
        else "# Transformers cannot load this model: it offers no to_hugging_face(state).\n"
        'from trainer.export import load_export  # with the package that registers it loaded\nmodel = load_export(".")'
    )
    numbers = sum(t.numel() for t in tensors.values())
    facts = {"model": config.name, "parameters": f"{numbers:,}", "vocabulary": f"{vocab_size:,}", **run_info}
    lines = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return (
        "# A model trained with zeroray\n\n"
        f"{lines}\n\n"
        "It continues text and was not taught to follow instructions or to be safe. A text begins with the bos token,\n"
        "which the tokenizer does not add by itself.\n\n"
        f"```python\n{loading}\n```\n"
    )


def load_export(folder: str) -> nn.Module:
    """The model in an exported folder, or in any folder with a plain Llama, on the CPU in fp32, in eval mode.

    Raises ValueError naming what is missing, damaged, or not ours.
    """
    config, vocab_size = read_config(folder)
    state = read_tensors(folder)
    model = bare_model(config, vocab_size)
    if isinstance(model, Decoder) and config.tied_embeddings:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    check_state(model, state)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in state:
                tensor.copy_(state[name])
    return model.eval()


def read_config(folder: str) -> tuple[Model, int]:
    """The model config and vocabulary size of a folder, from our own file, else from a Llama's `config.json`."""
    if os.path.exists(f"{folder}/{OWN_CONFIG}"):
        own = read_json(f"{folder}/{OWN_CONFIG}")
        if own.get("version") != OWN_VERSION:
            raise BadRequest(f"{folder}/{OWN_CONFIG}: version {own.get('version')}, this zeroray reads {OWN_VERSION}")
        unknown = set(own["model"]) - {field.name for field in dataclasses.fields(Model)}
        if unknown:
            raise BadRequest(f"{folder}/{OWN_CONFIG}: this zeroray knows no model.{', model.'.join(sorted(unknown))}")
        return Model(**{**own["model"], "attention": Attention.auto}), int(own["vocab_size"])
    try:
        config = read_json(f"{folder}/config.json")
    except FileNotFoundError as error:
        raise BadRequest(f"{folder}: no exported model (neither {OWN_CONFIG} nor config.json)") from error
    return from_llama(folder, config), int(config["vocab_size"])


def from_llama(folder: str, config: dict[str, Any]) -> Model:
    """Our config of a Hugging Face Llama; raises ValueError for what the decoder does not have."""
    heads, width = config["num_attention_heads"], config["hidden_size"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    refuse_others(
        folder,
        model_type=(config.get("model_type"), "llama"),
        hidden_act=(config.get("hidden_act", "silu"), "silu"),
        attention_bias=(config.get("attention_bias", False), False),
        mlp_bias=(config.get("mlp_bias", False), False),
        head_dim=(config.get("head_dim") or width // heads, width // heads),
        rope_type=(rope.get("rope_type") or rope.get("type") or "default", "default"),
    )
    return Model(
        name="decoder",
        layers=config["num_hidden_layers"],
        width=width,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        ffn_width=config["intermediate_size"],
        max_positions=config.get("max_position_embeddings", 2048),
        rope_theta=rope.get("rope_theta") or config.get("rope_theta", 10000.0),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied_embeddings=config.get("tie_word_embeddings", False),
    )


def refuse_others(folder: str, **found_and_ours: tuple[Any, Any]) -> None:
    """Raise ValueError for the first setting whose value is not the one the decoder has."""
    for name, (found, ours) in found_and_ours.items():
        if found != ours:
            raise BadRequest(f"{folder}/config.json: {name}={found}, but the in-tree decoder has {name}={ours} only")


def read_tensors(folder: str) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files; raises ValueError naming a file that is missing or damaged."""
    names = ["model.safetensors"]
    if os.path.exists(f"{folder}/model.safetensors.index.json"):
        names = sorted(set(read_json(f"{folder}/model.safetensors.index.json")["weight_map"].values()))
    state: dict[str, Tensor] = {}
    for name in names:
        if os.path.basename(name) != name:
            raise BadRequest(f"{folder}/model.safetensors.index.json: names a file outside the folder: {name}")
        try:
            state |= load_file(f"{folder}/{name}")
        except FileNotFoundError as error:
            raise BadRequest(f"{folder}/{name}: no such file") from error
        except SafetensorError as error:
            raise BadRequest(f"{folder}/{name}: damaged ({error})") from error
    return state
