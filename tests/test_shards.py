"""Token shards: plain tars any WebDataset reader opens, the same bytes every time, and damage is named."""

import hashlib
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import shards
from data_pipeline.shards import ShardWriter

pytestmark = pytest.mark.unit


def documents(count: int, seed: int = 0, vocab: int = 5000) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(3, vocab, random.integers(2, 900)).tolist() for _ in range(count)]


def write(folder: Path, docs: list[list[int]], vocab: int = 5000, name: str = "train-00000.tar") -> Any:
    with ShardWriter(str(folder), name, "train", vocab) as writer:
        for document in docs:
            writer.add(document)
    return writer.entry


@pytest.fixture
def small_members(monkeypatch):
    monkeypatch.setattr(shards, "MEMBER_BYTES", 20_000)
    monkeypatch.setattr(shards, "CHUNK_BYTES", 50_000)


@pytest.mark.parametrize("vocab", [5000, 100_000])
def test_offsets_lead_to_the_arrays_that_any_reader_finds(tmp_path, small_members, vocab):
    import webdataset as wds

    docs = documents(200, vocab=vocab)
    entry = write(tmp_path, docs, vocab)
    assert len(entry["members"]) > 5
    samples = list(wds.WebDataset(str(tmp_path / entry["name"]), shardshuffle=False))
    assert [s["__key__"] + ".tokens.npy" for s in samples] == [m["name"] for m in entry["members"]]
    data = (tmp_path / entry["name"]).read_bytes()
    tokens, lengths = [], []
    for sample, member in zip(samples, entry["members"], strict=True):
        theirs = np.load(io.BytesIO(sample["tokens.npy"]), allow_pickle=False)
        counts = np.load(io.BytesIO(sample["docs.npy"]), allow_pickle=False)
        assert theirs.dtype == (np.uint16 if vocab <= 65536 else np.uint32)
        begin = member["data_offset"]
        assert np.array_equal(np.frombuffer(data[begin : begin + member["bytes"]], theirs.dtype), theirs)
        begin = member["docs_offset"]
        assert np.array_equal(np.frombuffer(data[begin : begin + 8 * member["documents"]], np.int64), counts)
        tokens.append(theirs)
        lengths.append(counts)
    assert np.concatenate(tokens).tolist() == [t for d in docs for t in d]
    assert np.concatenate(lengths).tolist() == [len(d) for d in docs]


def test_the_bytes_are_fixed_and_the_entry_describes_them(tmp_path, small_members):
    docs = documents(100)
    one, two = write(tmp_path / "a", docs), write(tmp_path / "b", docs)
    assert one == two
    data = (tmp_path / "a" / one["name"]).read_bytes()
    assert data == (tmp_path / "b" / one["name"]).read_bytes()
    assert one["bytes"] == len(data)
    assert one["sha256"] == hashlib.sha256(data).hexdigest()
    step = one["chunk_bytes"]
    pieces = [data[i : i + step] for i in range(0, len(data), step)]
    assert one["chunk_sha256"] == [hashlib.sha256(p).hexdigest() for p in pieces]
    assert len(pieces) > 1
    with tarfile.open(tmp_path / "a" / one["name"]) as tar:
        assert {(m.mtime, m.uid, m.uname, m.mode) for m in tar} == {(0, 0, "zeroray", 0o444)}


def test_golden_bytes_of_a_shard(tmp_path):
    """When this fails, bump OPERATION_VERSIONS["shards"]: one key must never stand for two contents."""
    entry = write(tmp_path, [[0, 5, 6, 1], [0, 7, 1]])
    assert entry["sha256"] == "48e7e7fcaf39e126c9d882c5f084ae077190fcb9695bc3234fa5b789980f7604"


def test_no_documents_no_file(tmp_path):
    assert write(tmp_path, []) is None
    assert os.listdir(tmp_path) == []


def test_an_error_in_the_middle_leaves_nothing(tmp_path, small_members):
    def fail() -> None:
        with ShardWriter(str(tmp_path), "train-00000.tar", "train", 5000) as writer:
            for document in documents(100):
                writer.add(document)
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        fail()
    assert os.listdir(tmp_path) == []


def test_damage_is_named_by_shard_and_place(tmp_path, small_members):
    entry = write(tmp_path, documents(200))
    path = tmp_path / entry["name"]
    shards.verify(str(tmp_path), [entry])
    data = bytearray(path.read_bytes())
    data[120_000] ^= 1
    path.write_bytes(data)
    shards.check_sizes(str(tmp_path), [entry])
    with pytest.raises(ValueError, match=r"train-00000\.tar: damaged within bytes 100000 to 150000"):
        shards.verify(str(tmp_path), [entry])
    path.write_bytes(data[:-512])
    with pytest.raises(ValueError, match=r"train-00000\.tar: has \d+ bytes"):
        shards.check_sizes(str(tmp_path), [entry])
    path.unlink()
    with pytest.raises(ValueError, match=r"train-00000\.tar: is missing"):
        shards.check_sizes(str(tmp_path), [entry])
