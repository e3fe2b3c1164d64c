"""Initial weights: the same bytes for every ZeRO stage, world size, machine and order of building.

Each parameter has its own generator, keyed by (seed, name), so that no parameter depends on another.

    two axes and more      normal, standard deviation 0.02, or what the model's `initial_std(name)` says
    one axis, in a norm    weight 1, bias 0
    one axis, named bias   0
    other vectors          left as the model made them (`trainer.models` builds under the run's seed)

The surprise: numpy draws the numbers, not torch, whose `normal_` takes another path, to other bytes, on CPUs with AVX2.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

STD = 0.02


def initialize(model: nn.Module, seed: int) -> None:
    """Set every parameter of `model`; a parameter shared under several names is drawn once, under the first."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = initial_value(model, name, parameter, seed)
            if value is not None:
                parameter.copy_(value)


def initial_value(model: nn.Module, name: str, parameter: Tensor, seed: int) -> Tensor | None:
    """What `name` starts as, in fp32; None where it stays as the model made it."""
    if parameter.ndim >= 2:
        std_of = getattr(model, "initial_std", None)
        return normal(seed, name, tuple(parameter.shape)) * (std_of(name) if std_of is not None else STD)
    owner, _, own = name.rpartition(".")
    if own == "bias":
        return torch.zeros(parameter.shape)
    if own == "weight" and "norm" in type(model.get_submodule(owner)).__name__.lower():
        return torch.ones(parameter.shape)
    return None


def normal(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal fp32 numbers that depend on (seed, name, shape) alone."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32))
