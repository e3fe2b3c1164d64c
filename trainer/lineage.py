"""Which checkpoints count: generations fence off gangs that were replaced, without a coordination service.

Every gang claims a generation and, before it trains, records its base once: the newest valid commit it found.

    generations/gen-0003.json        the claim
    generations/gen-0003.base.json   {"commit": "checkpoints/step-00000100/gen-0002", "step": 100, "generation": 2}
    checkpoints/step-<n>/gen-<g>/    a commit, once it has a manifest.json

A reader starts at the newest generation with a base: its own commits count; then, of its base's generation, those up to
the base's step; and so on. What an old gang commits after a newer one recorded its base is never looked at.
"""

import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.store import create_exclusive, json_bytes, seal, unseal
from trainer.fragments import CheckpointError
from trainer.state import TrainState

MANIFEST = "manifest.json"


class Superseded(Exception):  # noqa: N818 (an outcome)
    """A newer generation of the run has started: this one must end, and a restart of it is of no use."""


@dataclass(frozen=True, slots=True)
class Commit:
    """One committed checkpoint of the run in `run_folder`; `seconds` is how long saving it took, if just saved."""

    run_folder: str
    step: int
    generation: int
    seconds: float = field(default=0.0, compare=False)

    @property
    def name(self) -> str:
        """Its folder, relative to the run folder."""
        return f"checkpoints/step-{self.step:08d}/gen-{self.generation:04d}"

    @property
    def folder(self) -> str:
        """Its folder."""
        return os.path.join(self.run_folder, self.name)

    @property
    def manifest_path(self) -> str:
        """The file that makes it a commit."""
        return os.path.join(self.folder, MANIFEST)

    def manifest(self) -> dict[str, Any]:
        """Its manifest; raises ValueError naming the path when it is damaged, FileNotFoundError when it is gone."""
        return unseal(self.manifest_path)

    def state(self) -> TrainState:
        """The training state in it."""
        return TrainState.from_json(self.manifest()["state"])

    @property
    def bytes(self) -> int:
        """The size of its tensors."""
        return int(self.manifest()["bytes"])


def folders(run_folder: str) -> list[Commit]:
    """Every checkpoint folder there is, committed or not, oldest step first."""
    top = os.path.join(run_folder, "checkpoints")
    found = []
    for step_name in sorted(os.listdir(top)) if os.path.isdir(top) else []:
        step = re.fullmatch(r"step-(\d{8,})", step_name)
        for name in sorted(os.listdir(os.path.join(top, step_name))) if step else []:
            generation = re.fullmatch(r"gen-(\d{4,})", name)
            if step and generation:
                found.append(Commit(run_folder, int(step.group(1)), int(generation.group(1))))
    return found


def commits(run_folder: str) -> list[Commit]:
    """Every commit there is, of any generation, valid or not."""
    return [c for c in folders(run_folder) if os.path.exists(c.manifest_path)]


def base_path(run_folder: str, generation: int) -> str:
    """Where a generation's base is recorded."""
    return os.path.join(run_folder, "generations", f"gen-{generation:04d}.base.json")


def bases(run_folder: str) -> list[int]:
    """The generations that recorded a base, ascending."""
    top = os.path.join(run_folder, "generations")
    names = os.listdir(top) if os.path.isdir(top) else []
    return sorted(int(m.group(1)) for m in (re.fullmatch(r"gen-(\d+)\.base\.json", n) for n in names) if m)


def base_of(run_folder: str, generation: int) -> Commit | None:
    """The commit a generation started from; None when it started from nothing or recorded nothing.

    Raises ValueError when the record is damaged.
    """
    try:
        record = unseal(base_path(run_folder, generation))
    except FileNotFoundError:
        return None
    return None if record["commit"] is None else Commit(run_folder, record["step"], record["generation"])


def record_base(run_folder: str, generation: int, base: Commit | None) -> None:
    """Record once what a generation starts from; from now on no older generation can add to the run.

    Raises Superseded when a newer one has done so, also in the same instant: of two, at least the older one sees it.
    """
    refuse_superseded(run_folder, generation)
    facts = (
        {"commit": None} if base is None else {"commit": base.name, "step": base.step, "generation": base.generation}
    )
    if not create_exclusive(base_path(run_folder, generation), json_bytes(seal(facts))):
        raise CheckpointError(f"{base_path(run_folder, generation)}: generation {generation} was started before")
    refuse_superseded(run_folder, generation)


def lineage(run_folder: str) -> list[Commit]:
    """The commits that count, newest first. Without any recorded base all do, by generation and step.

    Where a record is damaged, the generations before it count as far as they came.
    """
    by_generation: dict[int, list[Commit]] = defaultdict(list)
    for commit in reversed(commits(run_folder)):
        by_generation[commit.generation].append(commit)
    started = bases(run_folder)
    if not started:
        return [c for g in sorted(by_generation, reverse=True) for c in by_generation[g]]
    counted: list[Commit] = []
    generation, limit = started[-1], None
    while True:
        counted += [c for c in by_generation[generation] if limit is None or c.step <= limit]
        try:
            base = base_of(run_folder, generation)
        except ValueError:
            older = [c.generation for c in commits(run_folder) if c.generation < generation]
            if not older:
                return counted
            generation, limit = max(older), None
            continue
        if base is None or base.generation >= generation:
            return counted
        generation, limit = base.generation, base.step


def damaged_bases(run_folder: str) -> list[str]:
    """What is wrong with the records of bases, one sentence each that begins with the path."""
    found = []
    for generation in bases(run_folder):
        try:
            base_of(run_folder, generation)
        except ValueError as error:
            found.append(str(error).splitlines()[0])
    return found


def superseded_by(run_folder: str, generation: int) -> int | None:
    """The newer generation that has started since, if any."""
    newest = max(bases(run_folder), default=generation)
    return newest if newest > generation else None


def refuse_superseded(run_folder: str, generation: int) -> None:
    """Raise Superseded when a newer generation has started since."""
    newer = superseded_by(run_folder, generation)
    if newer is not None:
        raise Superseded(
            f"{run_folder}: another driver has taken over this run: "
            f"generation {newer} has started, this is generation {generation}"
        )
