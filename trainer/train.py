"""One rank's whole job: from prepared tokens to a trained, evaluated, exported model.

    train_rank(run, rank, generation)      what a gang's actor calls, and what torchrun runs below
        prepared tokens -> row view -> order program -> stream
        model (same bytes everywhere) -> engine -> newest valid checkpoint, or the step-0 one
        Loop.fit -> evaluate -> export

Without Ray, on one machine, after `zeroray run stages=[prepare] ...` with the same overrides:

    torchrun --nproc-per-node 2 -m trainer.train experiment=quickstart

The base of a generation is chosen by rank 0 and recorded before anyone reads it, so that every rank resumes from the
same commit and an older gang that is still alive can no longer publish (see `trainer.checkpoint`).
"""

import json
import logging
import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from conf.identity import content_hash, differences, scientific
from conf.refusal import BadRequest, refuse
from conf.registry import load_plugins
from conf.saved import to_yaml
from conf.schema import Run, Stage
from data_pipeline.ledger import Ledger
from data_pipeline.order import OrderProgram, Segment
from data_pipeline.packing import RowView
from data_pipeline.stages import Prepared, prepared, prepared_at
from data_pipeline.store import NoValidCheckpoint, claim_generation, write_bytes, write_json
from data_pipeline.stream import Batch, TrainStream, heldout_batches
from data_pipeline.unigram import unigram_bits_per_byte
from trainer import checkpoint
from trainer.distributed import RankInfo, barrier, close_distributed, init_distributed, sum_over_ranks
from trainer.engine import Engine
from trainer.engines import build_engine
from trainer.evaluate import evaluate
from trainer.export import export_hf
from trainer.generate import sample_texts
from trainer.loop import Loop
from trainer.models import build_model
from trainer.objectives import build_objective
from trainer.state import TrainState
from trainer.tracker import Tracker

log = logging.getLogger("zeroray")


@dataclass
class Job:
    """Everything one rank holds while it works; built once by `build_job`."""

    run: Run
    folder: str
    rank: RankInfo
    generation: int
    data: Prepared
    engine: Engine
    ledger: Ledger | None
    state: TrainState
    stream: TrainStream
    heldout: RowView
    token_bytes: np.ndarray


def run_folder(run: Run) -> str:
    """The folder of a run."""
    return os.path.join(run.paths.runs, run.run.name)


def train_rank(
    run: Run, rank: RankInfo, generation: int | None = None, tokens_folder: str | None = None
) -> dict[str, Any]:
    """Do the stages train, evaluate and export of `run` as one rank; returns {"state": "done"|"stopped", "step": n}.

    Without a `generation` rank 0 claims the next one; without a `tokens_folder` the corpus is listed to find it.
    Raises ValueError for what the user can mend, and whatever went wrong otherwise; nothing is retried here.
    """
    device = init_distributed(rank)
    try:
        if generation is None:
            own = claim_generation(os.path.join(run_folder(run), "generations"), {}) if rank.rank == 0 else 0
            generation = int(sum_over_ranks([float(own)], device)[0])
        data = prepared(run) if tokens_folder is None else prepared_at(tokens_folder)
        if data is None:
            names = [stage.name for stage in run.stages]
            raise refuse("stages", names, "the data of this run is not prepared", "add prepare to stages")
        return work(build_job(run, rank, generation, device, data))
    finally:
        close_distributed()


def build_job(run: Run, rank: RankInfo, generation: int, device: Any, data: Prepared) -> Job:
    """Open the rows, build model and engine, and resume from the base of this generation."""
    folder = run_folder(run)
    view, heldout = data.view("train", run.data.row_tokens), data.view("heldout", run.data.row_tokens)
    need_rows(view, heldout, run)
    engine = build_engine(run, build_model(run, data.vocab_size), rank, device)
    ledger = Ledger(folder) if rank.rank == 0 else None
    state = resume(run, folder, engine, generation, view=view, ledger=ledger)
    token_bytes = data.token_bytes()
    assert state.order is not None
    stream = TrainStream(view, state.order, token_bytes)
    return Job(run, folder, rank, generation, data, engine, ledger, state, stream, heldout, token_bytes)


def need_rows(view: RowView, heldout: RowView, run: Run) -> None:
    """Refuse a corpus that gives no row to train on or none to measure with."""
    if view.num_rows == 0:
        raise refuse(
            "data.row_tokens",
            run.data.row_tokens,
            "the corpus has fewer training tokens than one row",
            "use shorter rows or more text",
        )
    if heldout.num_rows == 0:
        raise refuse(
            "data.heldout_fraction",
            run.data.heldout_fraction,
            "no row of held-out text",
            "raise data.heldout_fraction, use shorter rows (data.row_tokens) or more text",
        )


def resume(
    run: Run, folder: str, engine: Engine, generation: int, *, view: RowView, ledger: Ledger | None
) -> TrainState:
    """Load the base of this generation into the engine, or start at step 0; rank 0 chooses and records the base."""
    base, damaged = checkpoint.choose_base(folder, generation, engine.rank)
    if ledger is not None:
        for reason in damaged:
            ledger.append("damaged", path=reason.split(": ")[0], reason=reason)
            log.warning("skipped a damaged checkpoint: %s", reason)
    if base is None:
        order = OrderProgram.start(run.run.seed, run.train.global_batch_rows, view.num_rows, view.view_hash)
        return TrainState(order=order, seed=run.run.seed, generation=generation, extra={"run": scientific(run)})
    state = checkpoint.load(engine, base)
    state.generation = generation
    same_run(run, state, ledger)
    continue_order(run, state, view)
    if ledger is not None:
        facts = {"generation": generation, "world_size": engine.world_size, "zero_stage": engine.zero_stage}
        ledger.append("resumed", step=state.step, commit=base.name, **facts)
    return state


def same_run(run: Run, state: TrainState, ledger: Ledger | None) -> None:
    """Refuse a checkpoint of another run than this one; what `run.allow` names may differ, and is recorded."""
    if state.step > run.train.steps:
        raise refuse(
            "train.steps", run.train.steps, f"this run is at step {state.step} already", f"use {state.step} or more"
        )
    changed = differences(state.extra.get("run", scientific(run)), scientific(run))
    for key, before, now in changed:
        if not any(key == name or key.startswith(f"{name}.") for name in run.run.allow):
            way_out = f"allow it with run.allow=[{key}], or choose another run.name"
            raise refuse(key, now, f"this run was trained with {before}", way_out)
    if changed and ledger is not None:
        text = ", ".join(f"{key} {before} -> {now}" for key, before, now in changed)
        ledger.append("decision", text=f"run.allow: from step {state.step} on {text}")
    state.extra["run"] = scientific(run)


def continue_order(run: Run, state: TrainState, view: RowView) -> None:
    """Go on in the order program; another batch size or seed, or other data that was allowed, is a new segment."""
    assert state.order is not None
    last = state.order.segments[-1]
    same_view, same_key = last.view == view.view_hash, last.key == run.run.seed
    if not same_view and not {key.split(".")[0] for key in run.run.allow} & {"data", "corpus", "tokenizer"}:
        raise refuse(
            "corpus",
            run.corpus.name,
            "the data of this run changed since it began",
            "restore it, allow it with run.allow=[data], or start another run with run.name=...",
        )
    state.seed = run.run.seed
    if same_view and same_key and last.batch_rows == run.train.global_batch_rows:
        return
    if state.step == 0:
        state.order = OrderProgram.start(run.run.seed, run.train.global_batch_rows, view.num_rows, view.view_hash)
        return
    start = state.order.next_place(state.step) if same_view and same_key else 0
    source = {"name": "corpus", "rows": view.num_rows, "weight": 1.0, "start": start}
    state.order.append(
        Segment(
            from_step=state.step,
            from_sample=state.order.samples(state.step).start,
            batch_rows=run.train.global_batch_rows,
            key=run.run.seed,
            view=view.view_hash,
            sources=[source],
        )
    )


def work(job: Job) -> dict[str, Any]:
    """Train, evaluate and export, as far as the run's stages say."""
    state = "done"
    if Stage.train in job.run.stages:
        state = train(job)
    elif job.state.step == 0:
        raise refuse(
            "stages", [s.name for s in job.run.stages], "this run has no checkpoint yet", "add train to stages"
        )
    if state == "done" and Stage.evaluate in job.run.stages:
        whole_evaluation(job)
    if state == "done" and Stage.export in job.run.stages:
        export(job)
    return {"state": state, "step": job.state.step}


def heldout(job: Job, rows: int) -> dict[str, float]:
    """The held-out figures over the first `rows` rows, by all ranks together."""
    rank, world = job.rank.rank, job.rank.world_size
    batches = heldout_batches(job.heldout, job.token_bytes, rank, world, job.run.train.micro_batch_rows, rows)
    objective, device = build_objective(job.run), job.engine.device

    def losses(batch: Batch) -> float:
        return job.engine.eval_sum(batch.to(device), objective)

    return evaluate(losses, batches, lambda sums: sum_over_ranks(sums, device))


def train(job: Job) -> str:
    """Train to the end or to a stop; the first checkpoint is that of step 0, so that a history always has one."""
    run, ledger = job.run, job.ledger
    tracker = None
    if ledger is not None:
        tracker = Tracker(run, job.folder, keep_bytes=job.state.metrics_bytes, attempt=job.generation)
        ledger.append("stage", stage="train", state="started", done=job.state.step, total=run.train.steps)
    rows = min(run.train.eval_rows, job.heldout.num_rows)
    loop = Loop(
        run,
        job.folder,
        job.engine,
        job.stream,
        job.state,
        lambda: heldout(job, rows),
        lambda s: save(job, s),
        tracker,
        ledger,
    )
    try:
        if job.state.step == 0:
            begin(job, loop, rows)
        state = loop.fit()
    finally:
        if tracker is not None:
            tracker.close()
    record_stage(job, Stage.train, state)
    return state


def begin(job: Job, loop: Loop, rows: int) -> None:
    """Measure the untrained model once and commit step 0."""
    before = heldout(job, rows)
    if job.ledger is not None:
        job.ledger.append("eval", step=0, when="before", loss=before["loss"], bpb=before["bpb"])
    log.info("held-out before training: loss %.4f, %.4f bits per byte", before["loss"], before["bpb"])
    if checkpoint.base_of(job.folder, job.generation) is None:
        loop.commit()


def save(job: Job, state: TrainState) -> None:
    """Commit a checkpoint and let go of old ones."""
    commit = checkpoint.save(job.engine, state, job.folder, job.generation)
    if job.ledger is not None:
        job.ledger.append(
            "checkpoint", step=state.step, generation=job.generation, bytes=commit.bytes, seconds=commit.seconds
        )
        checkpoint.prune(job.folder, job.run.train.keep_checkpoints, job.generation)


def stage_key(run: Run, data: Prepared) -> str:
    """What the stages after prepare depend on: the scientific keys and the tokens."""
    return content_hash([scientific(run), data.manifest.content_sha256])


def record_stage(job: Job, stage: Stage, state: str) -> None:
    """Write in the ledger how far a stage came."""
    if job.ledger is not None:
        key = stage_key(job.run, job.data)
        job.ledger.append(
            "stage", stage=stage.name, state=state, done=job.state.step, total=job.run.train.steps, key=key
        )


def whole_evaluation(job: Job) -> None:
    """Evaluate the final model on all held-out rows, beside the unigram token model, into `evaluation.json`."""
    after = heldout(job, job.heldout.num_rows)
    if job.ledger is not None:
        counts = job.data.token_counts()
        baseline = unigram_bits_per_byte(job.heldout, counts, job.token_bytes, job.heldout.num_rows)
        befores = [e for e in job.ledger.read() if e["event"] == "eval" and e.get("when") == "before"]
        figures = {
            "step": job.state.step,
            "heldout_rows": job.heldout.num_rows,
            "heldout": after,
            "heldout_unigram": {"bpb": baseline},
            "before": {k: befores[-1][k] for k in ("loss", "bpb")} if befores else None,
        }
        write_json(os.path.join(job.folder, "evaluation.json"), figures)
        job.ledger.append(
            "eval", step=job.state.step, when="after", loss=after["loss"], bpb=after["bpb"], unigram_bpb=baseline
        )
        log.info("held-out after training: %.4f bits per byte; unigram token model: %.4f", after["bpb"], baseline)
    record_stage(job, Stage.evaluate, "done")


def export(job: Job) -> None:
    """Write the Hugging Face folder and generated samples; all ranks gather, rank 0 writes."""
    weights = job.engine.full_state()
    if job.ledger is not None:
        out = os.path.join(job.folder, "export")
        info = {"run": job.run.run.name, "steps": job.state.step, "tokens": job.state.tokens, "seed": job.run.run.seed}
        export_hf(job.run.model, job.data.vocab_size, weights, job.data.tokenizer, out, run_info=info)
        samples = sample_texts(out, job.run.train.sample_prompts, job.run.train.sample_tokens, job.run.run.seed)
        write_json(os.path.join(job.folder, "samples.json"), samples)
    barrier()
    record_stage(job, Stage.export, "done")


def main(overrides: list[str]) -> int:
    """Run as one rank under torchrun; the exit code: 0 done, 2 bad request, 5 no valid checkpoint, 6 stopped."""
    from conf.compose import compose  # noqa: PLC0415 (only torchrun composes here; a gang gets a finished Run)

    rank = RankInfo.from_env()
    level = logging.INFO if rank.rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", force=True)
    try:
        run = compose(overrides)
        load_plugins(run.plugins, os.getcwd())
        if rank.rank == 0:
            write_bytes(os.path.join(run_folder(run), "run.yaml"), to_yaml(run).encode())
        outcome = train_rank(run, rank)
    except BadRequest as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except NoValidCheckpoint as error:
        sys.stderr.write(f"{error}\n")
        return 5
    if rank.rank == 0:
        sys.stdout.write(json.dumps(outcome) + "\n")
    return 0 if outcome["state"] == "done" else 6


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
