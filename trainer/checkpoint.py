"""Checkpoints free of world size and ZeRO stage, and which of them to continue from.

    commit = save(engine, state, run_folder, generation)   all ranks together
    base, damaged = choose_base(run_folder, generation, rank)
    state = load(engine, base)                              any number of ranks, any stage
    prune(run_folder, keep)

    <run folder>/checkpoints/step-00000100/gen-0003/
        rank-00000.safetensors   the fp32 weights and optimizer state that rank 0 owns
        rank-00000.json          which values these are, where they lie, the hash of every chunk
        manifest.json            the commit: TrainState, shapes, hashes of the rank files; written last

A save that fails anywhere commits nothing: each rank compares its fragments with the live parameters, and rank 0 checks
that the fragments of all ranks are every value exactly once. Works in any DeepSpeed or PyTorch script that wraps its
model in one of the engines; nothing here needs a `Run`.
"""

import contextlib
import hashlib
import os
import shutil
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conf.refusal import BadRequest
from data_pipeline.store import (
    NoValidCheckpoint,
    fsync_folder,
    json_bytes,
    read_json,
    seal,
    unseal,
    write_bytes,
    write_json,
)
from trainer import tensor_file
from trainer.distributed import barrier, first_failed_rank
from trainer.engine import Engine
from trainer.faults import point
from trainer.fragments import CheckpointError, cover_error
from trainer.lineage import (
    Commit,
    Superseded,
    base_of,
    bases,
    damaged_bases,
    folders,
    lineage,
    record_base,
    refuse_superseded,
    superseded_by,
)
from trainer.state import TrainState
from trainer.tensor_file import VerifiedFile

VERSION = 1
OTHER_MODEL = "set model.* and optim.* as they were, or start another run with run.name=..."

__all__ = [
    "CheckpointError",
    "Commit",
    "Superseded",
    "base_of",
    "choose_base",
    "damage",
    "lineage",
    "load",
    "newest_valid",
    "prune",
    "record_base",
    "save",
]


def save(engine: Engine, state: TrainState, run_folder: str, generation: int) -> Commit:
    """Commit `state` and what the engine holds; every rank calls it and gets the commit, or an error on every rank.

    Raises CheckpointError (fragments that are not the model, an incomplete cover), Superseded when a newer generation
    has started, or OSError of this rank's disk; then nothing was committed. Sets `state.parent` to the new commit.
    """
    began = time.monotonic()
    commit = Commit(run_folder, state.step, generation)
    state.generation, state.world_size, state.zero_stage = generation, engine.world_size, engine.zero_stage
    together(engine, commit, lambda: write_rank(engine, commit))
    together(engine, commit, lambda: publish(engine, state, commit) if engine.rank == 0 else None)
    state.parent = commit.name
    return replace(commit, seconds=time.monotonic() - began)


def together(engine: Engine, commit: Commit, act: Any) -> None:
    """Do this rank's part of a save; if any rank fails, all do, so that none waits for another for ever."""
    error: Exception | None = None
    try:
        act()
    except (CheckpointError, Superseded, OSError, ValueError) as found:
        error = found
    failed = first_failed_rank(error, engine.rank, engine.world_size, engine.device)
    if isinstance(error, CheckpointError | Superseded):
        raise type(error)(f"{error}; nothing was committed") from error
    if error is not None:
        raise error
    if failed is not None:
        refuse_superseded(commit.run_folder, commit.generation)
        raise CheckpointError(f"{commit.folder}: rank {failed} could not save its part; nothing was committed")


def rank_name(rank: int) -> str:
    """The name of a rank's two files, without ending."""
    return f"rank-{rank:05d}"


def write_rank(engine: Engine, commit: Commit) -> None:
    """Check and write what this rank owns, then the facts about it."""
    engine.check_fragments()
    point("checkpoint.before_tensors")
    pieces = list(engine.fragments())
    path = os.path.join(commit.folder, rank_name(engine.rank))
    facts, offsets = tensor_file.write(f"{path}.safetensors", pieces)
    point("checkpoint.after_tensors")
    table = [[f.name, f.kind, f.start, f.count, o] for f, o in zip(pieces, offsets, strict=True)]
    record = {
        "version": VERSION,
        "step": commit.step,
        "rank": engine.rank,
        "world_size": engine.world_size,
        "file": facts,
        "fragments": table,
    }
    write_bytes(f"{path}.json", json_bytes(seal(record)))


def publish(engine: Engine, state: TrainState, commit: Commit) -> None:
    """Check that all ranks together wrote everything once, then write the manifest (rank 0)."""
    refuse_superseded(commit.run_folder, commit.generation)
    if os.path.exists(commit.manifest_path):
        raise CheckpointError(f"{commit.folder}: there is a commit of this step already")
    paths = [os.path.join(commit.folder, f"{rank_name(r)}.json") for r in range(engine.world_size)]
    records = [unseal(path) for path in paths]
    for path, record in zip(paths, records, strict=True):
        if os.path.getsize(path.removesuffix("json") + "safetensors") != record["file"]["bytes"]:
            raise CheckpointError(f"{path}: rank 0 sees another size of its tensor file")
    shapes = engine.shapes()
    spans = [(n, k, start, count) for record in records for n, k, start, count, _ in record["fragments"]]
    wrong = cover_error(shapes, engine.kinds(), spans)
    if wrong is not None:
        raise CheckpointError(f"{wrong}")
    manifest = {
        "version": VERSION,
        "state": state.to_json(),
        "tensors": shapes,
        "kinds": sorted(engine.kinds()),
        "scalars": engine.scalars(),
        "ranks": [{"name": rank_name(r), "sha256": sha256(path)} for r, path in enumerate(paths)],
        "bytes": sum(record["file"]["bytes"] for record in records),
    }
    point("checkpoint.before_manifest")
    write_json(commit.manifest_path, seal(manifest))
    fsync_folder(os.path.dirname(commit.folder))
    fsync_folder(os.path.dirname(os.path.dirname(commit.folder)))
    point("checkpoint.after_manifest")


def sha256(path: str) -> str:
    """SHA-256 of a small file."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def rank_files(commit: Commit, manifest: dict[str, Any]) -> list[tuple[VerifiedFile, list[Any]]]:
    """The tensor file of each rank that saved, and its fragment table; raises CheckpointError naming a damaged file."""
    files = []
    for entry in manifest["ranks"]:
        path = os.path.join(commit.folder, entry["name"])
        try:
            if sha256(f"{path}.json") != entry["sha256"]:
                raise CheckpointError(f"{path}.json: damaged, its hash is not the one in the manifest")
        except OSError as error:
            raise CheckpointError(f"{path}.json: cannot be read ({error.strerror})") from error
        record = read_json(f"{path}.json")
        files.append((VerifiedFile(f"{path}.safetensors", record["file"]), record["fragments"]))
    return files


def damage(commit: Commit) -> str | None:
    """What is wrong with a commit, with the file's path, after reading all of it; None when it is whole."""
    try:
        for file, _ in rank_files(commit, commit.manifest()):
            wrong = file.damage()
            if wrong is not None:
                return wrong
    except FileNotFoundError:
        return f"{commit.manifest_path}: is missing"
    except (CheckpointError, ValueError, OSError) as error:
        return str(error)
    return None


def newest_valid(run_folder: str) -> tuple[Commit | None, list[str]]:
    """The newest commit that counts and is whole, and what is wrong with the newer ones that were passed over."""
    damaged = damaged_bases(run_folder)
    for commit in lineage(run_folder):
        wrong = damage(commit) or lost_metrics(commit)
        if wrong is None:
            return commit, damaged
        damaged.append(wrong)
    return None, damaged


def lost_metrics(commit: Commit) -> str | None:
    """What is wrong when rows that the commit counts on are gone from `metrics.jsonl`; None when they are there."""
    path = os.path.join(commit.run_folder, "metrics.jsonl")
    needed, there = commit.state().metrics_bytes, os.path.getsize(path) if os.path.exists(path) else 0
    return None if needed <= there else f"{path}: ends at byte {there}, {commit.name} needs {needed}"


def choose_base(run_folder: str, generation: int, rank: int) -> tuple[Commit | None, list[str]]:
    """What a new gang continues from, recorded once for its generation; the same on every rank.

    The damaged commits that were passed over are told to rank 0 only, which read them. When steps were trained and no
    commit is whole, raises NoValidCheckpoint on every rank and records nothing, so that a restored file still counts.
    A gang that comes after a newer one has started gets Superseded on every rank, before it has written anything.
    """
    damaged: list[str] = []
    if rank == 0 and superseded_by(run_folder, generation) is None:
        base, damaged = newest_valid(run_folder)
        if base is not None or not (damaged or trained_before(run_folder)):
            with contextlib.suppress(Superseded):  # told below, on every rank
                record_base(run_folder, generation, base)
    barrier()
    refuse_superseded(run_folder, generation)
    if generation not in bases(run_folder):
        raise NoValidCheckpoint(
            f"{run_folder}: has a history but no valid checkpoint ({damaged[0] if damaged else 'there is none'})\n"
            "restore one, or start over with run.fresh=true"
        )
    return base_of(run_folder, generation), damaged


def trained_before(run_folder: str) -> bool:
    """Whether the metrics of a step were written in this run."""
    path = os.path.join(run_folder, "metrics.jsonl")
    return os.path.exists(path) and os.path.getsize(path) > 0


class SliceReader:
    """Reads values (name, kind, start, count) of a commit, wherever the ranks that saved it put them."""

    def __init__(self, commit: Commit, manifest: dict[str, Any]) -> None:
        self.spans: dict[tuple[str, str], list[tuple[int, int, int, VerifiedFile]]] = defaultdict(list)
        self.files = rank_files(commit, manifest)
        for file, table in self.files:
            for name, kind, start, count, offset in table:
                self.spans[name, kind].append((start, start + count, offset, file))
        for spans in self.spans.values():
            spans.sort(key=lambda span: span[0])

    def __call__(self, name: str, kind: str, start: int, count: int) -> Tensor:
        """`count` verified values from `start` on."""
        values = torch.empty(count, dtype=torch.float32)
        done = 0
        for low, high, offset, file in self.spans[name, kind]:
            begin, end = max(low, start), min(high, start + count)
            if begin < end:
                read = file.values(offset + (begin - low) * tensor_file.VALUE_BYTES, end - begin)
                values[begin - start : end - start] = read
                done += end - begin
        if done != count:
            raise CheckpointError(f"{name}: the checkpoint has {done} of the {count} values of {kind} from {start} on")
        return values

    def close(self) -> None:
        """Let go of the files."""
        for file, _ in self.files:
            file.close()


def load(engine: Engine, commit: Commit) -> TrainState:
    """Fill the engine from a commit of any world size and stage, reading only what this rank holds.

    Raises CheckpointError naming the file when it is damaged, or the parameter when the model is another one.
    """
    manifest = commit.manifest()
    if manifest["version"] != VERSION:
        raise CheckpointError(
            f"{commit.folder}: checkpoint version {manifest['version']}, this program reads {VERSION}"
        )
    refuse_other_model(engine, manifest)
    reader = SliceReader(commit, manifest)
    try:
        engine.load_fragments(reader, manifest["scalars"])
    finally:
        reader.close()
    engine.check_fragments()
    state = TrainState.from_json(manifest["state"])
    state.parent = commit.name
    return state


def refuse_other_model(engine: Engine, manifest: dict[str, Any]) -> None:
    """Refuse a checkpoint of other parameters, shapes or optimizer state than the engine has."""
    ours, theirs = engine.shapes(), manifest["tensors"]
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            there, here = theirs.get(name, "none"), ours.get(name, "none")
            raise BadRequest(f"{name}: has shape {there} in the checkpoint and {here} in the model\n{OTHER_MODEL}")
    kinds = sorted(engine.kinds())
    if kinds != manifest["kinds"]:
        there = manifest["kinds"]
        raise BadRequest(f"the checkpoint has optimizer state {there}, the optimizer keeps {kinds}\n{OTHER_MODEL}")


def prune(run_folder: str, keep: int, generation: int | None = None) -> list[Commit]:
    """Remove all but the newest `keep` commits that count, and what dead gangs left; returns what was removed.

    Nothing older is removed while none of the kept ones is whole. A gang that was replaced removes nothing.
    """
    if generation is not None and superseded_by(run_folder, generation) is not None:
        return []
    counted = lineage(run_folder)
    kept = counted[:keep]
    spare = [c for c in folders(run_folder) if c not in kept and not may_be_in_progress(c, counted)]
    if not spare or (counted[keep:] and all(damage(c) is not None for c in kept)):
        return []
    for commit in spare:
        remove(commit)
    return spare


def may_be_in_progress(folder: Commit, counted: list[Commit]) -> bool:
    """Whether a folder may be a save that is not finished: newer than everything that counts."""
    return folder not in counted and all((folder.generation, folder.step) > (c.generation, c.step) for c in counted)


def remove(commit: Commit) -> None:
    """Remove a checkpoint: the manifest first, so that it is whole or no commit at any instant."""
    if os.path.exists(commit.manifest_path):
        os.unlink(commit.manifest_path)
        fsync_folder(commit.folder)
    point("checkpoint.in_prune")
    shutil.rmtree(commit.folder)
    step_folder = os.path.dirname(commit.folder)
    if not os.listdir(step_folder):
        os.rmdir(step_folder)
