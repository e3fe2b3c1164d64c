"""The `documents` stage: which documents there are, and what is decided about each.

    run(spec, task)       one task's pieces -> documents/task-00000.parquet (the index) + quarantine/task-00000.jsonl
    reduce(spec, results) all tasks         -> accounting, checked: read == kept + filtered + duplicates + quarantined
    kept(...)             the kept documents of a task again, with their text checked against the index

The index holds no text. Columns: file, offset, length (raw bytes), id, text_bytes, chars, sha256 (first 16 bytes of the
text's), heldout, and for each filter `filter/<name>` with its reason or null. Whether a document is held out is decided
by the hash of its text, so it never depends on order, on workers, or on what else is in the corpus.
"""

import base64
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from conf.refusal import BadRequest
from conf.registry import READERS
from data_pipeline import corpus, manifest
from data_pipeline.filters import build_filters, judge
from data_pipeline.readers import Broken, Document, ReadOptions, Record

BASE_SCHEMA = [
    ("file", pa.string()),
    ("offset", pa.int64()),
    ("length", pa.int64()),
    ("id", pa.string()),
    ("text_bytes", pa.int64()),
    ("chars", pa.int64()),
    ("sha256", pa.binary(16)),
    ("heldout", pa.bool_()),
]


@dataclass(slots=True)
class Kept:
    """A kept document: its text, its digest (16 bytes), and whether it is held out."""

    text: str
    digest: bytes
    heldout: bool
    text_bytes: int


def index_name(number: int) -> str:
    """The index of one task, below the stage's folder."""
    return f"documents/task-{number:05d}.parquet"


def is_heldout(digest: bytes, fraction: float) -> bool:
    """Whether the text with this hash is held out: the first 8 bytes as a number in [0, 1) below `fraction`."""
    return int.from_bytes(digest[:8], "big") < int(fraction * 2**64)


def records(root: str, config: dict[str, Any], task: dict[str, Any]) -> Iterator[Record]:
    """All records of a task, in order; the same at every reading, or ValueError naming the file that changed."""
    reader = READERS.get(config["reader"])()
    options = ReadOptions(
        max_document_bytes=config["max_document_bytes"], text_key=config["text_key"], id_key=config["id_key"]
    )
    for piece in task["pieces"]:
        _refuse_changed(root, piece)
        if "broken" in piece:
            yield Broken(piece["name"], 0, 0, piece["broken"], hashlib.sha256().hexdigest(), b"")
        else:
            yield from reader.read(os.path.join(root, piece["name"]), piece, options)


def _refuse_changed(root: str, piece: dict[str, Any]) -> None:
    if piece.get("broken") == "file_name_not_utf8":
        return
    now = corpus.facts(root, piece["name"])
    if any(now.get(k) != piece.get(k) for k in ("size", "mtime_ns", "broken")):
        raise BadRequest(
            f"corpus file {os.path.join(root, piece['name'])}: changed since the corpus was listed\n"
            "run the same command again; the changed corpus is prepared anew"
        )


def run(spec: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """Read one task's pieces, judge every document, write the index and the quarantine; returns the task's result."""
    config, folder, number = spec["config"], spec["folder"], task["number"]
    filters = build_filters({name: config["filters"][name] for name in config["filter_order"]})
    rows: list[dict[str, Any]] = []
    quarantine: list[dict[str, Any]] = []
    for record in records(spec["root"], config, task):
        if isinstance(record, Broken):
            quarantine.append(_quarantined(record))
        else:
            row = _row(record, config["heldout_fraction"])
            verdicts = {f"filter/{n}": judge(n, f, record.text, record.file) for n, f in filters.items()}
            rows.append({**row, **verdicts})
    schema = pa.schema([*BASE_SCHEMA, *((f"filter/{name}", pa.string()) for name in filters)])
    outputs = [manifest.write_output(folder, index_name(number), _parquet(rows, schema))]
    if quarantine:
        lines = "".join(json.dumps(q, sort_keys=True) + "\n" for q in quarantine)
        outputs.append(manifest.write_output(folder, f"quarantine/task-{number:05d}.jsonl", lines.encode()))
    return {"files": outputs, "accounting": _account(rows, list(filters), quarantine), "counts": _counts(rows, filters)}


def _row(document: Document, heldout_fraction: float) -> dict[str, Any]:
    text = document.text.encode()
    digest = hashlib.sha256(text).digest()
    return {
        "file": document.file,
        "offset": document.offset,
        "length": document.length,
        "id": document.id,
        "text_bytes": len(text),
        "chars": len(document.text),
        "sha256": digest[:16],
        "heldout": is_heldout(digest, heldout_fraction),
    }


def _quarantined(record: Broken) -> dict[str, Any]:
    return {
        "reason": record.reason,
        "path": record.file,
        "offset": record.offset,
        "length": record.length,
        "sha256": record.sha256,
        "head_base64": base64.b64encode(record.head).decode(),
    }


def _parquet(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def _reason(row: dict[str, Any], filters: list[str]) -> str | None:
    return next((row[f"filter/{name}"] for name in filters if row[f"filter/{name}"] is not None), None)


def _account(rows: list[dict[str, Any]], filters: list[str], quarantine: list[dict[str, Any]]) -> dict[str, Any]:
    reasons = [_reason(row, filters) for row in rows]
    return {
        "read": len(rows) + len(quarantine),
        "kept": reasons.count(None),
        "filtered": dict(sorted(Counter(reason for reason in reasons if reason is not None).items())),
        "duplicates": {},
        "quarantined": dict(sorted(Counter(q["reason"] for q in quarantine).items())),
    }


def _counts(rows: list[dict[str, Any]], filters: Any) -> dict[str, int]:
    kept_rows = [row for row in rows if _reason(row, list(filters)) is None]
    return {
        "documents": len(rows),
        "text_bytes": sum(row["text_bytes"] for row in rows),
        "kept_train_documents": sum(not row["heldout"] for row in kept_rows),
        "kept_train_bytes": sum(row["text_bytes"] for row in kept_rows if not row["heldout"]),
        "kept_heldout_documents": sum(row["heldout"] for row in kept_rows),
        "kept_heldout_bytes": sum(row["text_bytes"] for row in kept_rows if row["heldout"]),
    }


def add_up(trees: list[dict[str, Any]]) -> dict[str, Any]:
    """Add trees of numbers key by key (accountings, counts)."""
    total: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            total[key] = add_up([total.get(key, {}), value]) if isinstance(value, dict) else total.get(key, 0) + value
    return total


def balanced(accounting: dict[str, Any]) -> bool:
    """Whether every document that was read has exactly one fate."""
    fates = (accounting["filtered"], accounting["duplicates"], accounting["quarantined"])
    return bool(accounting["read"] == accounting["kept"] + sum(sum(f.values()) for f in fates))


def reduce(spec: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    """The outputs, counts and accounting of the whole stage."""
    accounting = add_up([result["accounting"] for result in results])
    assert balanced(accounting), f"documents were lost: {accounting}"
    return {
        "files": [f for result in results for f in result["files"]],
        "counts": add_up([result["counts"] for result in results]),
        "accounting": accounting,
    }


def kept(spec: dict[str, Any], task: dict[str, Any]) -> Iterator[Kept]:
    """The kept documents of a documents task, read again from the corpus and checked against the index."""
    config = spec["documents_config"]
    with open(f"{spec['documents_folder']}/{index_name(task['number'])}", "rb") as file:
        table = pq.read_table(file)
    rows = iter(table.to_pylist())
    for record in records(spec["root"], config, task):
        if isinstance(record, Broken):
            continue
        row = next(rows, None)
        text = record.text.encode()
        digest = hashlib.sha256(text).digest()[:16]
        if row is None or (row["file"], row["offset"], row["sha256"]) != (record.file, record.offset, digest):
            raise BadRequest(
                f"corpus file {os.path.join(spec['root'], record.file)}: the document at byte {record.offset} is not "
                "the one in the document index; the file changed\nrun the same command again"
            )
        if _reason(row, list(config["filters"])) is None:
            yield Kept(record.text, digest, row["heldout"], len(text))
    if next(rows, None) is not None:
        raise BadRequest(f"{spec['root']}: documents are missing that task {task['number']} of the index has")
