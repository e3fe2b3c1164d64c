"""A tiny tokenizer folder, run and model, for the tests that export and generate."""

import json
import os

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from conf.schema import Data, Model, Run
from trainer.models import build_model

TEXT = "def read(path):\n    return open(path).read()  # naïve — ünïcode\n"


def write_tokenizer(folder: str) -> None:
    """A byte-level BPE folder as the tokenizer stage writes it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    os.makedirs(folder)
    tokenizer.save(f"{folder}/tokenizer.json")
    config = dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=True))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    with open(f"{folder}/tokenizer_config.json", "w") as file:
        json.dump(config, file)
    with open(f"{folder}/token_bytes.npy", "wb") as file:
        file.write(b"not part of an export")


def run_of(**model) -> Run:
    """A run with a tiny decoder of at most 64 positions."""
    shape = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "max_positions": 64}
    return Run(model=Model(**{**shape, **model}), data=Data(row_tokens=shape["max_positions"]))


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    """What an engine's `full_state` gives: parameters by name, shared ones once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def trained(run: Run, vocab_size: int = 280) -> nn.Module:
    """The model of a run with weights that are not its initial ones."""
    model = build_model(run, vocab_size)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
    return model
