"""Learning rate as a function of the step: pure arithmetic, so that a resume has nothing to restore.

A schedule maps (progress from 0 to 1 after warmup, final fraction) to a fraction of the peak; `learning_rate` adds
the linear warmup. Other packages add schedules to `conf.registry.SCHEDULES`.
"""

import math

from conf.registry import SCHEDULES
from conf.schema import Run


@SCHEDULES.register("constant")
def constant(progress: float, final_fraction: float) -> float:
    """The peak, always."""
    return 1.0


@SCHEDULES.register("linear")
def linear(progress: float, final_fraction: float) -> float:
    """A straight line from the peak to the final fraction."""
    return 1.0 - (1.0 - final_fraction) * progress


@SCHEDULES.register("cosine")
def cosine(progress: float, final_fraction: float) -> float:
    """Half a cosine from the peak to the final fraction (Loshchilov and Hutter, SGDR, 2017, without restarts)."""
    return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))


def learning_rate(run: Run, step: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    >>> learning_rate(Run(), 0) == Run().optim.lr / 20
    True
    """
    steps = run.train.steps
    warmup = int(run.schedule.warmup_fraction * steps)
    if step < warmup:
        return run.optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    fraction: float = SCHEDULES.get(run.schedule.name)(min(1.0, progress), run.schedule.final_fraction)
    return run.optim.lr * fraction
