"""Optimizers by name, the two parameter groups, and optimizer state that exists before the first step.

    optimizer = build_optimizer(run, module)     two groups: matrices decay, vectors and scalars do not
    create_state(optimizer, params)              zeros now, so that a checkpoint can be loaded or saved at step 0
    refuse_unsliceable(run)                      an optimizer that needs whole matrices cannot be sliced over ranks

ZeRO steps slices of flattened weights. That is the same optimizer only if each value is updated by itself. Whether it
is can be tried: a small matrix is stepped whole, and as two pieces whose state was created by us, and both must agree.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conf.refusal import BadRequest, refuse
from conf.registry import OPTIMIZERS
from conf.schema import Optim, Run

Groups = list[dict[str, Any]]


@OPTIMIZERS.register("adamw")
def adamw(param_groups: Groups, config: Optim) -> Optimizer:
    """PyTorch's AdamW."""
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(param_groups, lr=config.lr, betas=betas, eps=config.eps, **config.options)


def parameter_groups(module: nn.Module, config: Optim) -> Groups:
    """The two groups: parameters of two or more dimensions decay, all others do not; an empty group is left out."""
    params = list(module.parameters())
    groups: Groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def build_optimizer(run: Run, module: nn.Module) -> Optimizer:
    """The optimizer that `optim.name` names, over the parameters of `module` in two groups."""
    build = OPTIMIZERS.get(run.optim.name)
    optimizer: Optimizer = build(parameter_groups(module, run.optim), run.optim)
    return optimizer


def set_lr(optimizer: Any, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def state_pattern(run: Run) -> dict[str, Any]:
    """What the optimizer keeps for a weight, by key: None for a tensor like it, else a zero of the number's kind.

    Found by stepping one small weight with a zero gradient.
    """
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = OPTIMIZERS.get(run.optim.name)([{"params": [weight], "weight_decay": 0.0}], run.optim)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    pattern: dict[str, Any] = {}
    for key, value in optimizer.state[weight].items():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            pattern[key] = None
        elif isinstance(value, Tensor) and value.ndim == 0:
            pattern[key] = torch.zeros_like(value)
        elif isinstance(value, int | float):
            pattern[key] = type(value)(0)
        else:
            raise refuse(
                "optim.name", run.optim.name, f"its state {key!r} is neither one value per weight nor one number",
                "use optim.name=adamw",
            )  # fmt: skip
    return pattern


def create_state(optimizer: Any, params: list[Tensor], pattern: dict[str, Any]) -> None:
    """Create the state of `params` as it is before the first step: all zeros."""
    for param in params:
        optimizer.state[param] = {
            key: torch.zeros_like(param.data) if zero is None else zero.clone() if isinstance(zero, Tensor) else zero
            for key, zero in pattern.items()
        }


def refuse_unsliceable(run: Run) -> None:
    """Refuse an optimizer whose update of a value depends on other values of the matrix."""
    build, pattern = OPTIMIZERS.get(run.optim.name), state_pattern(run)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 6, generator=generator)
    whole = nn.Parameter(start.clone())
    pieces = [nn.Parameter(piece.clone()) for piece in (start.flatten()[:7], start.flatten()[7:])]
    alone = build([{"params": [whole], "weight_decay": run.optim.weight_decay}], run.optim)
    sliced = build([{"params": pieces, "weight_decay": run.optim.weight_decay}], run.optim)
    create_state(sliced, list(pieces), pattern)
    for _ in range(3):
        whole.grad = torch.randn(4, 6, generator=generator)
        pieces[0].grad, pieces[1].grad = whole.grad.flatten()[:7].clone(), whole.grad.flatten()[7:].clone()
        try:
            alone.step()
            sliced.step()
        except Exception as error:  # an optimizer of another package may object to a vector in any way
            raise unsliceable(run) from error
    together = torch.cat([piece.detach() for piece in pieces])
    if not torch.allclose(together, whole.detach().flatten(), rtol=1e-6, atol=1e-7):
        raise unsliceable(run)


def unsliceable(run: Run) -> BadRequest:
    """The refusal of an optimizer that ZeRO would change."""
    return refuse(
        "optim.name",
        run.optim.name,
        f"it needs whole matrices, which zero.stage={run.zero.stage} slices",
        "use zero.stage=0 or train.engine=plain, or optim.name=adamw",
    )
