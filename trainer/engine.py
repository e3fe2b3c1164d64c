"""The engine: who partitions the model, computes gradients over all ranks, and steps the optimizer.

    engine = build_engine(run, module, rank, device)                              # trainer.engines
    result = engine.train_step(batches, objective, num_labels_global, lr)      # batches = the micro-batches of one step
    engine.fragments() / load_fragments() / check_fragments()                  # what a checkpoint is made of

The loss of a step is (sum over ranks and micro-batches of the objective's sums) / num_labels_global, whatever the world
size and the number of micro-batches. Two implementations: DeepSpeed (`engine_deepspeed`), and plain PyTorch
(`engine_plain`), the truth ZeRO is compared with.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainer.fragments import Fragment, Reader

Objective = Callable[[nn.Module, dict[str, Tensor]], Tensor]


class Batch(Protocol):
    """The little an engine wants of a micro-batch."""

    def tensors(self) -> dict[str, Tensor]:
        """What the objective gets, on the engine's device."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step: this rank's loss sum, the global gradient norm before clipping, whether it was applied."""

    loss_sum: float
    grad_norm: float
    skipped: bool


class Engine(Protocol):
    """What the loop and the checkpoint need of an engine; every method is called on all ranks together."""

    module: nn.Module
    rank: int
    world_size: int
    device: torch.device
    zero_stage: int

    def train_step(self, batches: list[Any], objective: Objective, num_labels_global: int, lr: float) -> StepResult:
        """Forward and backward of every micro-batch, then one optimizer step at learning rate `lr`."""

    def eval_sum(self, batch: Any, objective: Objective) -> float:
        """The objective's sum on one batch, without gradients; every rank calls it equally often."""

    def shapes(self) -> dict[str, list[int]]:
        """The whole shape of every trained parameter, by name."""

    def kinds(self) -> set[str]:
        """What there is of every parameter: "param" and the optimizer's state names."""

    def fragments(self) -> Iterator[Fragment]:
        """What this rank owns: over all ranks, every value of the fp32 weights and optimizer state exactly once."""

    def scalars(self) -> dict[str, dict[str, float]]:
        """What the optimizer keeps once per parameter (AdamW: `step`), equal on all ranks."""

    def load_fragments(self, reader: Reader, scalars: dict[str, dict[str, float]]) -> None:
        """Fill weights and optimizer state from `reader(name, kind, start, count)` and make the model use them."""

    def check_fragments(self) -> None:
        """Compare every owned fragment with the live parameter; raises CheckpointError naming the parameter."""

    def full_state(self) -> dict[str, Tensor]:
        """The whole fp32 weights by name on rank 0, gathered one at a time; empty elsewhere."""
