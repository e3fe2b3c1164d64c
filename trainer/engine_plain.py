"""The plain PyTorch engine: the whole model and optimizer on every rank, gradients summed over ranks.

It is short enough to be read as the definition of a step, and is what every ZeRO stage is compared with:

    gradient = sum over ranks and micro-batches of d(loss sum) / num_labels_global
    gradient *= min(1, clip_norm / |gradient|);  optimizer step

`WholeHolder` shows whole parameters and optimizer state as fragments; DeepSpeed's stage 0 uses it too.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conf.schema import Precision, Run
from trainer.distributed import RankInfo
from trainer.engine import Objective, StepResult
from trainer.fragments import PARAM, Fragment, Held
from trainer.optim import build_optimizer, create_state, set_lr, state_pattern


class WholeHolder:
    """Fragments of a model of which every rank holds everything."""

    replicated = True

    def __init__(self, module: nn.Module, optimizer: Any, pattern: dict[str, Any]) -> None:
        self.params = dict(module.named_parameters())
        self.optimizer = optimizer
        self.pattern = pattern
        create_state(optimizer, list(self.params.values()), pattern)

    def kinds(self) -> set[str]:
        """What there is of every parameter."""
        return {PARAM, *(key for key, zero in self.pattern.items() if zero is None)}

    def shapes(self) -> dict[str, list[int]]:
        """The whole shape of every parameter."""
        return {name: list(p.shape) for name, p in self.params.items()}

    def held(self) -> Iterator[Fragment]:
        """Every parameter and its optimizer state, flattened."""
        for name, param in self.params.items():
            yield Fragment(name, PARAM, 0, param.data.view(-1))
            for key in sorted(self.kinds() - {PARAM}):
                yield Fragment(name, key, 0, self.optimizer.state[param][key].view(-1))

    def live(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, flattened."""
        for name, param in self.params.items():
            yield name, param.data.view(-1)

    def scalars(self) -> dict[str, dict[str, float]]:
        """The optimizer's numbers per parameter."""
        return {name: read_scalars(self.optimizer.state[p], self.pattern) for name, p in self.params.items()}

    def set_scalars(self, scalars: dict[str, dict[str, float]]) -> None:
        """Set the optimizer's numbers per parameter."""
        for name, param in self.params.items():
            write_scalars(self.optimizer.state[param], self.pattern, scalars[name])

    def publish(self) -> None:
        """The fragments are the live parameters."""


def read_scalars(state: dict[str, Any], pattern: dict[str, Any]) -> dict[str, float]:
    """The numbers, not tensors, among one parameter's optimizer state."""
    return {key: float(state[key]) for key, zero in pattern.items() if zero is not None}


def write_scalars(state: dict[str, Any], pattern: dict[str, Any], values: dict[str, float]) -> None:
    """Set the numbers of one parameter's optimizer state, each in its own kind."""
    for key, zero in pattern.items():
        if isinstance(zero, Tensor):
            state[key] = torch.full_like(zero, values[key])
        elif zero is not None:
            state[key] = type(zero)(values[key])


class PlainEngine(Held):
    """The engine without partitions."""

    zero_stage = 0

    def __init__(self, run: Run, module: nn.Module, rank: RankInfo, device: torch.device) -> None:
        self.module = module.to(device)
        self.rank, self.world_size, self.device = rank.rank, rank.world_size, device
        self.clip_norm = run.train.clip_norm
        self.bf16 = run.train.precision is Precision.bf16
        self.optimizer = build_optimizer(run, self.module)
        self.holder = WholeHolder(self.module, self.optimizer, state_pattern(run))

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forward; weights stay fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def train_step(self, batches: list[Any], objective: Objective, num_labels_global: int, lr: float) -> StepResult:
        """One optimizer step over the micro-batches `batches` of this rank."""
        self.module.train()
        losses = []
        for batch in batches:
            with self.autocast():
                loss = objective(self.module, batch.tensors())
            (loss / max(1, num_labels_global)).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach().double())
        self.sum_gradients()
        norm = clip_gradients(self.module, self.clip_norm)
        finite = bool(torch.isfinite(norm))
        if finite:
            set_lr(self.optimizer, lr)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(float(torch.stack(losses).sum()), float(norm), skipped=not finite)

    def sum_gradients(self) -> None:
        """Sum every gradient over the ranks; a parameter without one has the gradient zero."""
        waits = []
        for param in self.module.parameters():
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            if self.world_size > 1:
                waits.append(dist.all_reduce(param.grad, async_op=True))
        for wait in waits:
            wait.wait()

    @torch.no_grad()
    def eval_sum(self, batch: Any, objective: Objective) -> float:
        """The objective's sum on one batch."""
        self.module.eval()
        with self.autocast():
            return float(objective(self.module, batch.tensors()))


def clip_gradients(module: nn.Module, clip_norm: float) -> Tensor:
    """Scale the gradients down to `clip_norm` (0 leaves them); returns their norm before that."""
    return nn.utils.clip_grad_norm_(module.parameters(), clip_norm or float("inf"))
