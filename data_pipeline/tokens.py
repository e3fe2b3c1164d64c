"""The `tokens` stage: the kept documents as token shards, one per split for each documents task.

    run(spec, task)        -> train-00000.tar, heldout-00000.tar (none when empty), counts/task-00000.npy
    reduce(spec, results)  -> all shards in task order, token_counts.npy

`token_counts.npy` counts the train split's tokens by id, without the bos that begins each document: what a model is
asked to predict, and so what the unigram baseline is made of.
"""

import io
import os
from typing import Any

import numpy as np

from data_pipeline import documents, manifest, tokenizer
from data_pipeline.shards import ShardWriter

SPLITS = ("train", "heldout")


def run(spec: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """Tokenize one documents task into its shards; returns the task's result."""
    folder, number = spec["folder"], task["number"]
    encoder = tokenizer.load(spec["tokenizer_folder"])
    counts = np.zeros(encoder.vocab_size, np.int64)
    text_bytes = dict.fromkeys(SPLITS, 0)
    names = {split: f"{split}-{number:05d}.tar" for split in SPLITS}
    with (
        ShardWriter(folder, names["train"], "train", encoder.vocab_size) as train,
        ShardWriter(folder, names["heldout"], "heldout", encoder.vocab_size) as heldout,
    ):
        for document in documents.kept(spec, task):
            ids = encoder.encode(document.text)
            (heldout if document.heldout else train).add(ids)
            text_bytes["heldout" if document.heldout else "train"] += document.text_bytes
            if not document.heldout:
                np.add.at(counts, ids[1:], 1)
    files = [manifest.write_output(folder, f"counts/task-{number:05d}.npy", _npy(counts))]
    shards = [writer.entry for writer in (train, heldout) if writer.entry]
    return {"files": files, "shards": shards, "counts": _split_counts(shards, text_bytes)}


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _split_counts(shards: list[dict[str, Any]], text_bytes: dict[str, int]) -> dict[str, Any]:
    counts = {}
    for split in SPLITS:
        mine = [s for s in shards if s["split"] == split]
        counts[split] = {
            "documents": sum(s["documents"] for s in mine),
            "tokens": sum(s["tokens"] for s in mine),
            "text_bytes": text_bytes[split],
        }
    return counts


def reduce(spec: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    """All shards in task order, and the token counts of the train split."""
    folder = spec["folder"]
    names = [f["name"] for result in results for f in result["files"]]
    total = sum(np.load(os.path.join(folder, name), allow_pickle=False) for name in names)
    shards = [shard for result in results for shard in result["shards"]]
    return {
        "shards": sorted(shards, key=lambda s: SPLITS.index(s["split"])),
        "files": [manifest.write_output(folder, "token_counts.npy", _npy(np.asarray(total)))],
        "counts": {
            **documents.add_up([result["counts"] for result in results]),
            "vocab_size": spec["config"]["vocab_size"],
            **{f"{kind}_id": spec["config"][f"{kind}_id"] for kind in ("bos", "eos", "pad")},
        },
        "accounting": spec["accounting"],
        "tokenizer_sha256": spec["config"]["tokenizer_sha256"],
    }
