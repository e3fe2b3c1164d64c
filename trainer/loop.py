"""The training loop: short, and the same for every engine and world size.

    for step in state.step .. train.steps:
        batches  = this rank's share of the step's samples        (arithmetic, no state)
        result   = engine.train_step(batches)                     (loss = sum over all ranks / labels of all ranks)
        row      = one JSON object, equal on every rank           (one all-reduce of a handful of numbers)
        every now and then: evaluate, save, look at the clock
        stop, with a checkpoint, when someone asked for it

The surprise: the request to stop travels in the same all-reduce as the loss, so that all ranks stop at the same step.
"""

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from conf.schema import Run
from data_pipeline.ledger import Ledger
from data_pipeline.stream import TrainStream
from trainer.distributed import sum_over_ranks
from trainer.engine import Engine
from trainer.objectives import build_objective
from trainer.schedules import learning_rate
from trainer.state import TrainState
from trainer.tracker import Tracker

log = logging.getLogger("zeroray")

STOP_FILE = "stop"


@dataclass
class Loop:
    """What one rank needs to train; `fit` is the loop. `tracker` and `ledger` are rank 0's, None elsewhere."""

    run: Run
    folder: str
    engine: Engine
    stream: TrainStream
    state: TrainState
    evaluate: Callable[[], dict[str, float]]
    save: Callable[[TrainState], None]
    tracker: Tracker | None
    ledger: Ledger | None
    last_saved: int = field(init=False)

    def __post_init__(self) -> None:
        self.last_saved = self.state.step
        self.objective = build_objective(self.run)
        self.started, self.first_step = time.monotonic(), self.state.step

    def fit(self) -> str:
        """Train to `train.steps`; returns "done", or "stopped" when a stop was asked for. Ends on a saved step."""
        stopped = False
        while self.state.step < self.run.train.steps and not stopped:
            row, stopped = self.step()
            if self.state.step % self.run.train.eval_every == 0 or self.state.step == self.run.train.steps:
                row |= self.evaluated()
            self.log(row)
            if self.due(stopped):
                self.commit()
        return "done" if self.state.step >= self.run.train.steps else "stopped"

    def due(self, stopped: bool) -> bool:
        """Whether this step ends with a checkpoint."""
        return (
            stopped or self.state.step % self.run.train.checkpoint_every == 0 or self.state.step == self.run.train.steps
        )

    def step(self) -> tuple[dict[str, Any], bool]:
        """One optimizer step; returns its metrics row and whether a stop was asked for."""
        began = time.monotonic()
        engine, step = self.engine, self.state.step
        batches = self.stream.micro_batches(step, engine.rank, engine.world_size, self.run.train.micro_batch_rows)
        own = [sum(b.num_labels for b in batches), sum(b.text_bytes for b in batches), self.stop_wanted()]
        labels, text_bytes, stop = sum_over_ranks([float(v) for v in own], engine.device)
        data_s = time.monotonic() - began
        rate = learning_rate(self.run, step)
        result = engine.train_step(
            [b.to(engine.device) for b in batches],
            self.objective,
            int(labels),
            rate,
        )
        data_of_ranks = [data_s if rank == engine.rank else 0.0 for rank in range(engine.world_size)]
        loss_sum, *data_of_ranks = sum_over_ranks([result.loss_sum, *data_of_ranks], engine.device)
        loss = loss_sum / max(1.0, labels)
        if not math.isfinite(loss) or not math.isfinite(result.grad_norm):
            raise FloatingPointError(
                f"step {step + 1}: loss {loss}, gradient norm {result.grad_norm}; nothing of this step was committed\n"
                "lower optim.lr or train.clip_norm; the checkpoints before it are whole"
            )
        self.advance(int(labels))
        step_s = time.monotonic() - began
        row = {
            "step": self.state.step,
            "train/loss": loss,
            "train/ppl": math.exp(min(loss, 700.0)),
            "train/bpb": loss_sum / math.log(2) / text_bytes if text_bytes else None,
            "train/tokens": self.state.tokens,
            "train/samples": self.state.samples,
            "train/epoch": self.state.samples / self.stream.view.num_rows,
            "optim/lr": rate,
            "optim/grad_norm": result.grad_norm,
            "optim/skipped_steps": int(result.skipped),
            "perf/step_s": step_s,
            "perf/tokens_per_s": labels / step_s,
            "perf/tokens_per_s_per_device": labels / step_s / engine.world_size,
            "time/data_s": max(data_of_ranks),
            **self.run_metrics(),
        }
        return row, stop > 0

    def advance(self, labels: int) -> None:
        """Move the state one step on."""
        self.state.samples = self.stream.order.samples(self.state.step).stop
        self.state.step += 1
        self.state.tokens += labels

    def run_metrics(self) -> dict[str, Any]:
        """How far the run is, and how long it will still take at the pace of this attempt."""
        here, total = self.state.step, self.run.train.steps
        pace = (time.monotonic() - self.started) / (here - self.first_step)
        return {
            "run/progress": here / total,
            "run/eta_s": pace * (total - here),
            "run/generation": self.state.generation,
            "run/world_size": self.engine.world_size,
        }

    def stop_wanted(self) -> bool:
        """Whether someone asked this run to stop; only rank 0 looks, the others hear of it."""
        return self.engine.rank == 0 and os.path.exists(os.path.join(self.folder, STOP_FILE))

    def evaluated(self) -> dict[str, float]:
        """The held-out figures under their metric names."""
        began = time.monotonic()
        found = self.evaluate()
        if self.ledger is not None:
            self.ledger.append("eval", step=self.state.step, when="during", loss=found["loss"], bpb=found["bpb"])
        return {**{f"eval/heldout/{k}": v for k, v in found.items()}, "time/eval_s": time.monotonic() - began}

    def commit(self) -> None:
        """Save a checkpoint of the present step; metrics up to here are durable before it is."""
        began = time.monotonic()
        if self.tracker is not None:
            self.state.metrics_bytes = self.tracker.flush()
        self.save(self.state)
        self.last_saved = self.state.step
        log.info("checkpoint of step %d in %.2f s", self.state.step, time.monotonic() - began)

    def log(self, row: dict[str, Any]) -> None:
        """Send the row to the sinks, and a line to the log every `train.log_every` steps."""
        if self.tracker is not None:
            self.tracker.log(row)
        if self.state.step % self.run.train.log_every == 0 or self.state.step == self.run.train.steps:
            log.info(
                "step %d/%d  loss %.4f  lr %.2e  grad %.3f  %.0f tokens/s  ETA %.0f s",
                row["step"],
                self.run.train.steps,
                row["train/loss"],
                row["optim/lr"],
                row["optim/grad_norm"],
                row["perf/tokens_per_s"],
                row["run/eta_s"],
            )
