"""What ranks do in the tests of engines and checkpoints: a small decoder on made-up packed documents."""

import hashlib
from typing import Any

import numpy as np
import torch

from conf.registry import OBJECTIVES
from conf.schema import Data, EngineKind, Model, Optim, Precision, Run, Train, Zero
from data_pipeline.order import OrderProgram
from data_pipeline.stream import TrainStream
from trainer import checkpoint
from trainer.distributed import RankInfo, sum_over_ranks
from trainer.engine import Engine
from trainer.engines import build_engine
from trainer.models import build_model
from trainer.state import TrainState

VOCAB = 61
ROW = 16


class MadeUpView:
    """Rows of documents of random length whose next token is mostly a function of the last."""

    row_tokens, num_rows, view_hash, folder = ROW, 97, "made-up", "nowhere"

    def example(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        random = np.random.default_rng(row)
        tokens = [int(random.integers(3, VOCAB))]
        for _ in range(ROW):
            follows = (tokens[-1] * 7 + 3) % (VOCAB - 3) + 3
            tokens.append(follows if random.random() < 0.8 else int(random.integers(3, VOCAB)))
        starts = np.array([0, *sorted({int(s) for s in random.integers(1, ROW, 2)})], np.int64)
        labels = np.array(tokens[1:], np.int64)
        labels[starts[1:] - 1] = -100
        return np.array(tokens[:-1], np.int64), labels, starts


def make_run(engine: str = "deepspeed", stage: int = 1, precision: str = "fp32", **extra: Any) -> Run:
    """6 rows a step in micro-batches of 2: 3 micro-batches alone, 2 on two ranks (the last of one row), 1 on three."""
    zero = Zero(stage=stage)
    zero.extra = {"stage3_param_persistence_threshold": 0, **extra} if stage == 3 else extra  # a test may plant a fault
    return Run(
        data=Data(row_tokens=ROW),
        model=Model(layers=2, width=24, heads=4, kv_heads=2, ffn_width=40, max_positions=ROW),
        train=Train(global_batch_rows=6, micro_batch_rows=2, engine=EngineKind[engine], precision=Precision[precision]),
        optim=Optim(lr=1e-3),
        zero=zero,
    )


def make_engine(run: Run, rank: RankInfo) -> Engine:
    return build_engine(run, build_model(run, VOCAB), rank, torch.device("cpu"))


def steps(run: Run, engine: Engine, begin: int, end: int) -> list[list[float]]:
    """[loss, gradient norm] of the steps from `begin` up to `end`."""
    order = OrderProgram.start(0, run.train.global_batch_rows, MadeUpView.num_rows, "made-up")
    stream = TrainStream(MadeUpView(), order, np.ones(VOCAB, np.int32))  # type: ignore[arg-type]
    objective = OBJECTIVES.get("causal_lm")
    rows = []
    for step in range(begin, end):
        batches = stream.micro_batches(step, engine.rank, engine.world_size, run.train.micro_batch_rows)
        (labels,) = sum_over_ranks([sum(b.num_labels for b in batches)], engine.device)
        rate = run.optim.lr * min(1.0, (step + 1) / 5)
        done = engine.train_step(batches, lambda m, b: objective(m, b, {}), int(labels), rate)
        (loss,) = sum_over_ranks([done.loss_sum], engine.device)
        rows.append([loss / labels, done.grad_norm])
    return rows


def weights_sha256(engine: Engine) -> str:
    """The hash of all weights, on rank 0."""
    digest = hashlib.sha256()
    for name, value in sorted(engine.full_state().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def follow(rank: RankInfo, options: dict[str, Any], end: int, save_at: int = 0, folder: str = "") -> dict[str, Any]:
    """Train from step 0 to `end`, saving once on the way."""
    run = make_run(**options)
    engine = make_engine(run, rank)
    first = weights_sha256(engine)
    rows = steps(run, engine, 0, save_at)
    if folder:
        checkpoint.save(engine, TrainState(step=save_at, tokens=7, seed=3), folder, 1)
    rows += steps(run, engine, save_at, end)
    engine.check_fragments()
    return {"rows": rows, "first": first, "last": weights_sha256(engine), "eval": evaluation(run, engine)}


def evaluation(run: Run, engine: Engine) -> float:
    """A loss sum over all ranks without gradients."""
    order = OrderProgram.start(1, run.train.global_batch_rows, MadeUpView.num_rows, "made-up")
    stream = TrainStream(MadeUpView(), order, np.ones(VOCAB, np.int32))  # type: ignore[arg-type]
    objective = OBJECTIVES.get("causal_lm")
    batches = stream.micro_batches(0, engine.rank, engine.world_size, 2)
    own = sum(engine.eval_sum(b, lambda m, b: objective(m, b, {})) for b in batches)
    return sum_over_ranks([own], engine.device)[0]


def resume(rank: RankInfo, options: dict[str, Any], folder: str, again: str, end: int) -> dict[str, Any]:
    """Load the newest commit of `folder`, save it at once under `again`, train on to `end`."""
    run = make_run(**options)
    engine = make_engine(run, rank)
    commit, damaged = checkpoint.newest_valid(folder)
    assert commit is not None and damaged == []
    state = checkpoint.load(engine, commit)
    checkpoint.save(engine, state, again, 2)
    rows = steps(run, engine, state.step, end)
    engine.check_fragments()
    return {"rows": rows, "last": weights_sha256(engine), "step": state.step, "tokens": state.tokens}


def in_turn(rank: RankInfo, job: Any, calls: list[list[Any]]) -> list[Any]:
    """One job after another in the same processes; ZeRO-3 must be the last, it leaves patched functions behind."""
    return [job(rank, *call) for call in calls]


def try_save(rank: RankInfo, options: dict[str, Any], folder: str, step: int = 2) -> str:
    """Train two steps and save; returns what the save said."""
    run = make_run(**options)
    engine = make_engine(run, rank)
    steps(run, engine, 0, 2)
    return said(lambda: checkpoint.save(engine, TrainState(step=step), folder, 1))


def said(act: Any) -> str:
    """The error of `act`, empty when there was none."""
    try:
        act()
    except (checkpoint.CheckpointError, OSError) as error:
        return str(error)
    return ""


def forced_round_robin(rank: RankInfo, folder: str) -> str:
    """A save under a setting that is forbidden, forced through."""
    from trainer import engine_deepspeed

    engine_deepspeed.refuse_extra = lambda extra: None
    return try_save(rank, {"stage": 2, "round_robin_gradients": True}, folder)


def left_out(rank: RankInfo, folder: str) -> list[str]:
    """A save in which rank 1 leaves one fragment out, then one whose disk is full on rank 1, then a whole one."""
    run = make_run(stage=1)
    engine: Any = make_engine(run, rank)
    steps(run, engine, 0, 1)
    whole = engine.holder.held
    heard = []
    if rank.rank == 1:
        engine.holder.held = lambda: (f for number, f in enumerate(whole()) if number != 4)
    heard.append(said(lambda: checkpoint.save(engine, TrainState(step=1), folder, 1)))
    engine.holder.held = whole
    if rank.rank == 1:
        written = checkpoint.tensor_file.write
        checkpoint.tensor_file.write = no_space
    heard.append(said(lambda: checkpoint.save(engine, TrainState(step=1), folder, 1)))
    if rank.rank == 1:
        checkpoint.tensor_file.write = written
    heard.append(said(lambda: checkpoint.save(engine, TrainState(step=1), folder, 1)))
    return heard


def no_space(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


def saves(rank: RankInfo, options: dict[str, Any], folder: str, numbers: list[int], generation: int = 1) -> list[str]:
    """A save at each of the steps `numbers`, one step of training before each; then pruning to 2."""
    run = make_run(**options)
    engine = make_engine(run, rank)
    base, _ = checkpoint.choose_base(folder, generation, rank.rank)
    state = TrainState() if base is None else checkpoint.load(engine, base)
    for number in numbers:
        if number <= state.step:
            continue
        steps(run, engine, state.step, number)
        state.step = number
        checkpoint.save(engine, state, folder, generation)
        if rank.rank == 0:
            checkpoint.prune(folder, 2, generation)
    return [weights_sha256(engine)]


def lost_peer(rank: RankInfo) -> str:
    """Rank 1 is killed between two steps."""
    import os
    import signal

    run = make_run(stage=2)
    engine = make_engine(run, rank)
    steps(run, engine, 0, 1)
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    steps(run, engine, 1, 3)
    return "went on"


def diverged(rank: RankInfo, folder: str) -> str:
    """A save after one weight of rank 1 went its own way, which no partition would show."""
    engine = make_engine(make_run(engine="plain"), rank)
    if rank.rank == 1:
        with torch.no_grad():
            next(engine.module.parameters()).view(-1)[3] += 1e-6
    return said(lambda: checkpoint.save(engine, TrainState(step=1), folder, 1))
