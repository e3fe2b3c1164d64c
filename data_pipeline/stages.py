"""The stages of preparing data, as work that anything can execute: a loop, a pool, Ray.

    manifests = []
    for build in plan(run):                        # documents, tokenizer, tokens
        work = build(*manifests)
        if not work.done():
            for task in work.tasks():              # in any order, on any machine, twice if you like
                if not work.task_done(task):
                    run_task(work.spec(), task)    # plain JSON in, plain JSON out
            work.finish()
        manifests.append(Manifest.load(work.folder))

A task commits by writing the sealed `tasks/task-00000.json` after its outputs; a stage commits by writing its manifest.
Everything appears whole or not at all, and a task's bytes depend on its description alone: run again after a kill, it
writes the same bytes. A downstream stage is keyed by the *content* of its inputs, so a file that was only touched
makes its documents be read again, and nothing after that.
"""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from conf.identity import content_hash
from conf.refusal import refuse
from conf.registry import FILTERS, READERS, load_plugins
from conf.schema import Run
from data_pipeline import corpus, documents, manifest, store, tokenizer, tokens
from data_pipeline.filters import build_filters
from data_pipeline.manifest import Manifest
from data_pipeline.packing import RowView

STAGES: dict[str, Any] = {"documents": documents, "tokenizer": tokenizer, "tokens": tokens}


class Work(Protocol):
    """One stage's work; plain data in and out."""

    name: str
    folder: str

    def spec(self) -> dict[str, Any]:
        """What `run_task` needs besides the task, JSON-able."""

    def describe(self) -> str:
        """One sentence for a person."""

    def done(self) -> bool:
        """Whether the stage is committed."""

    def tasks(self) -> list[dict[str, Any]]:
        """All tasks, JSON-able, in an order that does not depend on workers."""

    def task_done(self, task: dict[str, Any]) -> bool:
        """Whether the task's committed result exists and its outputs stand."""

    def finish(self) -> Manifest:
        """Reduce the results of all tasks to the manifest and commit it."""


@dataclass(slots=True)
class StageWork:
    """The one implementation of `Work`; what a stage does is in the module `STAGES[name]`."""

    name: str
    folder: str
    description: str
    _spec: dict[str, Any]
    _tasks: list[dict[str, Any]] = field(repr=False)

    def spec(self) -> dict[str, Any]:
        """What `run_task` needs besides the task."""
        return self._spec

    def describe(self) -> str:
        """One sentence for a person."""
        return self.description

    def done(self) -> bool:
        """Whether the manifest exists and its own hash holds."""
        return manifest.committed(self.folder)

    def tasks(self) -> list[dict[str, Any]]:
        """All tasks in order."""
        return self._tasks

    def task_done(self, task: dict[str, Any]) -> bool:
        """Whether the task is committed."""
        return task_result(self.folder, task["number"]) is not None

    def finish(self) -> Manifest:
        """Reduce and commit; every task must be done."""
        results = [task_result(self.folder, task["number"]) for task in self._tasks]
        missing = [task["number"] for task, result in zip(self._tasks, results, strict=True) if result is None]
        assert not missing, f"{self.name}: tasks {missing} are not done"
        parts = STAGES[self.name].reduce(self._spec, results)
        names = ("name", "key", "inputs", "config", "operations")
        made = Manifest(**{"stage" if n == "name" else n: self._spec[n] for n in names}, **parts)
        made.save(self.folder)
        return made


def task_result(folder: str, number: int) -> dict[str, Any] | None:
    """The committed result of a task, or None when it is missing, damaged, or an output of it is gone."""
    try:
        result = store.unseal(f"{folder}/tasks/task-{number:05d}.json")
    except (FileNotFoundError, ValueError):
        return None
    stand = manifest.outputs_stand(folder, [*result["files"], *result.get("shards", [])])
    return result if stand else None


def run_task(work_spec: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """Do one task in any process, unless it is done, and commit it; returns a small summary with its seconds."""
    began = time.monotonic()
    plugin_folder = work_spec["folder_of_plugins"]
    load_plugins(work_spec["plugins"], plugin_folder if os.path.isdir(plugin_folder) else os.getcwd())
    folder, number = work_spec["folder"], task["number"]
    result = task_result(folder, number)
    redone = result is None
    if result is None:
        result = STAGES[work_spec["name"]].run(work_spec, task)
        sealed = store.seal({"number": number, **result})
        store.write_json(f"{folder}/tasks/task-{number:05d}.json", sealed)
    return {
        "stage": work_spec["name"],
        "task": number,
        "computed": redone,
        "counts": result["counts"],
        "accounting": result.get("accounting", {}),
        "bytes": sum(o["bytes"] for o in [*result["files"], *result.get("shards", [])]),
        "seconds": round(time.monotonic() - began, 3),
    }


def plan(run: Run) -> list[Callable[..., StageWork]]:
    """The builders of the stages, in order; each is called with the manifests of the stages before it."""
    return [functools.partial(builder, run) for builder in (documents_work, tokenizer_work, tokens_work)]


def _build(
    run: Run, name: str, description: str, tasks: list[dict[str, Any]], keyed: dict[str, Any], **extra: Any
) -> StageWork:
    """A stage's work: `keyed` (config, inputs, operations, listing) makes its key, `extra` is only handed to tasks."""
    key = content_hash({"stage": name, **keyed})
    folder = os.path.abspath(manifest.stage_folder(run.paths.store, name, key))
    spec = {
        "name": name,
        "folder": folder,
        "key": key,
        "inputs": keyed["inputs"],
        "config": keyed["config"],
        "operations": keyed["operations"],
        "plugins": run.plugins,
        "folder_of_plugins": os.getcwd(),
        **extra,
    }
    return StageWork(name, folder, description, spec, tasks)


def _input(made: Manifest) -> dict[str, str]:
    return {"stage": made.stage, "key": made.key, "content_sha256": made.content_sha256}


def _content(made: Manifest) -> dict[str, str]:
    return {"stage": made.stage, "content_sha256": made.content_sha256}


def documents_config(run: Run) -> dict[str, Any]:
    """The keys that decide which documents there are and what is thought of them."""
    return {
        "reader": run.corpus.reader,
        "text_key": run.corpus.text_key,
        "id_key": run.corpus.id_key,
        "heldout_fraction": run.data.heldout_fraction,
        "task_bytes": run.data.task_bytes,
        "max_document_bytes": run.data.max_document_bytes,
        "filters": run.data.filters,
    }


def _listed(run: Run) -> tuple[corpus.Listing, list[dict[str, Any]]]:
    listing = corpus.list_corpus(run.corpus, (run.paths.runs, run.paths.store))
    reader = READERS.get(run.corpus.reader)()
    return listing, corpus.split_tasks(listing.files, run.data.task_bytes, reader)


def documents_work(run: Run) -> StageWork:
    """List the corpus and plan its reading; raises ValueError when a path, reader or filter is not there."""
    load_plugins(run.plugins, os.getcwd())
    build_filters(run.data.filters)
    listing, tasks = _listed(run)
    operations = {
        "documents": manifest.OPERATION_VERSIONS["documents"],
        f"reader/{run.corpus.reader}": manifest.operation_version(READERS.get(run.corpus.reader), "readers"),
        **{f"filter/{n}": manifest.operation_version(FILTERS.get(n), "filters") for n in run.data.filters},
    }
    sentence = f"documents: {len(listing.files)} files, {listing.num_bytes / 1e6:.1f} MB in {len(tasks)} tasks"
    if whole := listing.unsplittable(run.data.task_bytes, READERS.get(run.corpus.reader)()):
        sentence += f" ({whole} larger than data.task_bytes cannot be split)"
    # The order of filters matters (the first reason is counted), and a hash of sorted keys would not see it.
    keyed = {
        "config": {**documents_config(run), "filter_order": list(run.data.filters)},
        "operations": operations,
        "inputs": [],
        "listing": listing.files,
    }
    return _build(run, "documents", sentence, tasks, keyed, root=listing.root)


def _reread(run: Run, read: Manifest) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is needed to read the kept documents of the documents stage `read` again."""
    listing, tasks = _listed(run)
    folder = os.path.abspath(manifest.stage_folder(run.paths.store, "documents", read.key))
    return {"root": listing.root, "documents_folder": folder, "documents_config": read.config}, tasks


def tokenizer_work(run: Run, read: Manifest) -> StageWork:
    """Plan the tokenizer, one task; raises ValueError when nothing is kept or `tokenizer.path` is not there."""
    if not read.counts["kept_train_documents"]:
        raise refuse("data.filters", run.data.filters, f"no document is kept: {read.accounting}", "loosen the filters")
    path = tokenizer.import_path(run.tokenizer.path) if run.tokenizer.path else None
    keyed: dict[str, Any] = {"operations": {"tokenizer": manifest.OPERATION_VERSIONS["tokenizer"]}, "inputs": []}
    if path:
        keyed["config"] = {"path_sha256": store.file_sha256(path), "vocab_size": None, "sample_bytes": None}
        sentence = f"tokenizer: imported from {run.tokenizer.path}{tokenizer.caution(path)}"
        return _build(run, "tokenizer", sentence, [{"number": 0}], keyed, path=path)
    sample_bytes = min(run.tokenizer.sample_bytes, read.counts["kept_train_bytes"])
    config = {"path_sha256": None, "vocab_size": run.tokenizer.vocab_size, "sample_bytes": sample_bytes}
    keyed = {**keyed, "config": config, "inputs": [_content(read)]}
    extra, tasks = _reread(run, read)
    sentence = f"tokenizer: {config['vocab_size']} tokens from {sample_bytes / 1e6:.1f} MB in 1 task"
    made = _build(
        run,
        "tokenizer",
        sentence,
        [{"number": 0, "documents_tasks": tasks}],
        keyed,
        path=None,
        train_bytes=read.counts["kept_train_bytes"],
        **extra,
    )
    made.spec()["inputs"] = [_input(read)]
    return made


def tokens_work(run: Run, read: Manifest, spelled: Manifest) -> StageWork:
    """Plan the token shards: one task for each documents task."""
    counts = spelled.counts
    config = {
        "vocab_size": counts["vocab_size"],
        **{f"{kind}_id": counts[f"{kind}_id"] for kind in ("bos", "eos", "pad")},
        "tokenizer_sha256": spelled.tokenizer_sha256,
    }
    operations = {name: manifest.OPERATION_VERSIONS[name] for name in ("tokens", "shards")}
    keyed = {"config": config, "operations": operations, "inputs": [_content(read), _content(spelled)]}
    extra, tasks = _reread(run, read)
    folder = os.path.abspath(manifest.stage_folder(run.paths.store, "tokenizer", spelled.key))
    kept = read.accounting["kept"]
    sentence = f"tokens: {kept} documents to shards in {len(tasks)} tasks"
    made = _build(run, "tokens", sentence, tasks, keyed, tokenizer_folder=folder, accounting=read.accounting, **extra)
    made.spec()["inputs"] = [_input(read), _input(spelled)]
    return made


@dataclass(slots=True)
class Prepared:
    """The three finished stages of a run: their folders, and what training needs of them."""

    documents: str
    tokenizer: str
    tokens: str
    manifest: Manifest

    @property
    def accounting(self) -> dict[str, Any]:
        """The fate of every document."""
        return self.manifest.accounting

    @property
    def vocab_size(self) -> int:
        """Number of token ids (a small corpus may have fewer than `tokenizer.vocab_size`)."""
        return int(self.manifest.counts["vocab_size"])

    def view(self, split: str, row_tokens: int) -> RowView:
        """The rows of a split."""
        return RowView(self.tokens, split, row_tokens)

    def token_bytes(self) -> np.ndarray:
        """Bytes of text per token id."""
        return tokenizer.load_token_bytes(self.tokenizer)

    def token_counts(self) -> np.ndarray:
        """How often each id is to be predicted in the train split."""
        return np.asarray(np.load(f"{self.tokens}/token_counts.npy", allow_pickle=False))


def prepared(run: Run) -> Prepared | None:
    """The finished stages of a run, found by their keys without computing anything; None when one is not done."""
    manifests: list[Manifest] = []
    for build in plan(run):
        work = build(*manifests)
        if not work.done():
            return None
        manifests.append(Manifest.load(work.folder))
    return _prepared(run.paths.store, [(m.stage, m.key) for m in manifests], manifests[-1])


def prepared_at(tokens_folder: str) -> Prepared:
    """The finished stages behind a tokens folder, by its manifest alone: the corpus may be gone or changed since."""
    made = Manifest.load(tokens_folder)
    store_path = os.path.dirname(os.path.dirname(os.path.abspath(tokens_folder)))
    keys = [(made.stage, made.key), *((i["stage"], i["key"]) for i in made.inputs)]
    return _prepared(store_path, keys, made)


def _prepared(store_path: str, keys: list[tuple[str, str]], made: Manifest) -> Prepared:
    folders = {stage: os.path.abspath(manifest.stage_folder(store_path, stage, key)) for stage, key in keys}
    return Prepared(
        documents=folders["documents"], tokenizer=folders["tokenizer"], tokens=folders["tokens"], manifest=made
    )
