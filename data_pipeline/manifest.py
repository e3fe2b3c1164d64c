"""What a stage made: the manifest is its commit, and the only thing through which stages meet.

A stage's folder is `<paths.store>/<stage>/<first 20 hex of its key>/`. The key is the hash of the scientific config it
read, of its inputs and of the versions of the operations it used, so equal work has one folder. The stage is done when
`manifest.json` stands there and its own hash holds. `content_sha256` covers the output bytes and nothing else: two
manifests with the same one have the same outputs, whatever machine, path, number of workers or kills made them.
"""

import dataclasses
import hashlib
import inspect
import os
from dataclasses import dataclass, field
from typing import Any

from conf.identity import content_hash
from conf.refusal import BadRequest
from data_pipeline import store

VERSION = 1

# Bumped by hand when an operation's output changes for the same input; golden tests guard that nobody forgets.
OPERATION_VERSIONS = {"documents": 1, "filters": 1, "readers": 1, "tokenizer": 1, "tokens": 1, "shards": 1}


def operation_version(thing: Any, ours: str) -> object:
    """The version of a registered reader or filter: ours by hand, another package's by the hash of its source file."""
    if getattr(thing, "__module__", "").startswith("data_pipeline."):
        return OPERATION_VERSIONS[ours]
    try:
        return store.file_sha256(inspect.getfile(thing))
    except TypeError:  # not a class or a function: it has to say
        return getattr(thing, "version", 0)


@dataclass(kw_only=True, slots=True)
class Manifest:
    """One stage's commit. `shards` are token tars with their offsets; `files` are all other outputs."""

    stage: str
    key: str
    inputs: list[dict[str, str]]
    config: dict[str, Any]
    operations: dict[str, Any]
    shards: list[dict[str, Any]] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    accounting: dict[str, Any] = field(default_factory=dict)
    tokenizer_sha256: str = ""
    content_sha256: str = ""
    version: int = VERSION

    def save(self, folder: str) -> None:
        """Commit: write the sealed `manifest.json` of `folder`, with the hash of the outputs."""
        outputs = [[o["name"], o["bytes"], o["sha256"]] for o in [*self.shards, *self.files]]
        self.content_sha256 = content_hash(outputs)
        store.write_json(f"{folder}/manifest.json", store.seal(dataclasses.asdict(self)))

    @classmethod
    def load(cls, folder: str) -> "Manifest":
        """Read a committed manifest; raises ValueError naming the file when it is damaged or of another version."""
        path = f"{folder}/manifest.json"
        value = store.unseal(path)
        if value.get("version") != VERSION:
            raise BadRequest(f"{path}: version {value.get('version')}, this program reads {VERSION}")
        return cls(**{k: v for k, v in value.items() if k != "self_sha256"})


def committed(folder: str) -> bool:
    """Whether the stage of `folder` is done: its manifest exists and its own hash holds."""
    try:
        Manifest.load(folder)
    except (FileNotFoundError, ValueError):
        return False
    return True


def stage_folder(store_path: str, stage: str, key: str) -> str:
    """Where the stage with this key lives."""
    return f"{store_path}/{stage}/{key[:20]}"


def write_output(folder: str, name: str, data: bytes) -> dict[str, Any]:
    """Write one output file of a stage and return its manifest entry."""
    store.write_bytes(f"{folder}/{name}", data)
    return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def outputs_stand(folder: str, outputs: list[dict[str, Any]]) -> bool:
    """Whether all `outputs` are in `folder` with their sizes (a cheap check; hashes are for `verify`)."""
    paths = [(f"{folder}/{o['name']}", o["bytes"]) for o in outputs]
    return all(os.path.exists(path) and os.path.getsize(path) == size for path, size in paths)
