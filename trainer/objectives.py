"""Objectives by name: what is minimized, as a scalar SUM over labels; the engine divides by the labels of all ranks.

objective(model, batch, options) -> Tensor      batch = `Batch.tensors()`, options = `objective.options`
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from conf.refusal import refuse
from conf.registry import OBJECTIVES
from conf.schema import Run


@OBJECTIVES.register("causal_lm")
def causal_lm(model: nn.Module, batch: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """Cross-entropy of the next token."""
    if options:
        raise refuse("objective.options", options, "causal_lm has no options", "remove objective.options")
    loss: Tensor = model(**batch)
    return loss


def build_objective(run: Run) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    """The objective that `objective.name` names, with its options bound."""
    named: Callable[..., Tensor] = OBJECTIVES.get(run.objective.name)
    return lambda model, batch: named(model, batch, run.objective.options)
