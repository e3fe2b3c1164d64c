"""Rows as a view: against plain slicing of the concatenated documents, for many row lengths and member borders."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.identity import content_hash
from data_pipeline import packing, shards
from data_pipeline.manifest import Manifest
from data_pipeline.packing import RowView
from data_pipeline.shards import ShardWriter
from data_pipeline.unigram import unigram_bits_per_byte

pytestmark = pytest.mark.unit


def store_documents(folder: Path, split_docs: list[list[list[int]]], split: str = "train") -> None:
    """A finished tokens stage with one shard for each list of documents."""
    entries: list[dict[str, Any]] = []
    for number, docs in enumerate(split_docs):
        with ShardWriter(str(folder), f"{split}-{number:05d}.tar", split, 5000) as writer:
            for document in docs:
                writer.add(document)
        if writer.entry:
            entries.append(writer.entry)
    facts = {"key": content_hash(str(folder)), "inputs": [], "config": {}, "operations": {}}
    Manifest(stage="tokens", shards=entries, **facts).save(str(folder))


def make_docs(seed: int, count: int) -> list[list[int]]:
    """Documents [bos, ..., eos] with lengths from 2 (an empty text) up."""
    random = np.random.default_rng(seed)
    return [[0, *random.integers(3, 5000, random.integers(0, 40)).tolist(), 1] for _ in range(count)]


@pytest.fixture
def three_shards(tmp_path, monkeypatch) -> tuple[Path, list[list[int]]]:
    monkeypatch.setattr(shards, "MEMBER_BYTES", 700)  # many members, so that rows cross their borders
    parts = [make_docs(1, 60), make_docs(2, 1), make_docs(3, 90)]
    store_documents(tmp_path, parts)
    return tmp_path, [d for part in parts for d in part]


@pytest.mark.parametrize("length", [1, 2, 7, 64, 1000])
def test_rows_are_slices_of_all_documents_one_after_the_other(three_shards, length):
    folder, docs = three_shards
    flat = np.array([t for d in docs for t in d])
    is_start = np.zeros(len(flat) + 1, bool)
    is_start[np.cumsum([0, *map(len, docs)])] = True
    view = RowView(str(folder), "train", length)
    assert view.num_tokens == len(flat)
    assert view.num_rows == (len(flat) - 1) // length
    for i in np.random.default_rng(0).permutation(view.num_rows):
        begin = int(i) * length
        tokens, starts = view.row(int(i))
        assert tokens.dtype == np.int64 and starts.dtype == np.int64
        assert np.array_equal(tokens, flat[begin : begin + length + 1])
        expected = np.flatnonzero(is_start[begin : begin + length])
        assert starts.tolist() == sorted({0, *expected.tolist()})
        ids, labels, same_starts = view.example(int(i))
        assert np.array_equal(ids, tokens[:-1]) and np.array_equal(same_starts, starts)
        after = is_start[begin + 1 : begin + length + 1]
        assert np.array_equal(labels, np.where(after, -100, tokens[1:]))


def test_every_token_that_can_be_predicted_is_predicted_once(three_shards):
    folder, docs = three_shards
    view = RowView(str(folder), "train", 1)
    labels = np.concatenate([view.example(i)[1] for i in range(view.num_rows)])
    assert (labels != -100).sum() == sum(len(d) - 1 for d in docs)


def test_rows_stay_right_when_maps_and_members_are_dropped(three_shards, monkeypatch):
    folder, _ = three_shards
    view = RowView(str(folder), "train", 30)
    before = [view.row(i)[0] for i in range(view.num_rows)]
    monkeypatch.setattr(packing, "MAX_OPEN_SHARDS", 1)
    monkeypatch.setattr(packing, "MAX_MEMBER_STARTS", 2)
    narrow = RowView(str(folder), "train", 30)
    for i in (*range(view.num_rows), *reversed(range(view.num_rows))):
        assert np.array_equal(narrow.row(i)[0], before[i])
        assert len(narrow._maps) <= 1 and len(narrow._arrays) <= 2


def test_views_differ_by_hash_and_an_absent_split_has_no_rows(three_shards):
    folder, _ = three_shards
    views = [RowView(str(folder), "train", 8), RowView(str(folder), "train", 9), RowView(str(folder), "heldout", 8)]
    assert len({v.view_hash for v in views}) == 3
    assert RowView(str(folder), "train", 8).view_hash == views[0].view_hash
    assert views[2].num_rows == 0
    with pytest.raises(IndexError):
        views[0].row(views[0].num_rows)


def test_a_shard_of_another_size_is_named_on_opening_and_a_flipped_bit_by_verify(three_shards):
    folder, _ = three_shards
    path = folder / "train-00002.tar"
    data = bytearray(path.read_bytes())
    data[3000] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"train-00002\.tar: damaged"):
        RowView(str(folder), "train", 8).verify()
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"train-00002\.tar: has"):
        RowView(str(folder), "train", 8)


def test_the_unigram_baseline_by_hand(tmp_path):
    store_documents(tmp_path, [[[0, 3, 4, 1], [0, 4, 4, 1]]], "heldout")
    view = RowView(str(tmp_path), "heldout", 3)  # labels: 3 4 1 | (bos) 4 4; the last token finds no row
    counts, sizes = np.array([0, 2, 0, 1, 3]), np.array([0, 0, 0, 1, 5])
    p = (counts + 1) / (counts.sum() + 5)
    bits = -np.log2(p[[3, 4, 1, 4, 4]]).sum()
    assert unigram_bits_per_byte(view, counts, sizes, 100) == pytest.approx(bits / 16)
    with pytest.raises(ValueError, match="heldout_fraction"):
        unigram_bits_per_byte(RowView(str(tmp_path), "train", 3), counts, sizes, 100)


def test_a_flipped_bit_is_found_when_its_row_is_first_read(three_shards):
    folder, _ = three_shards
    shard = sorted(folder.glob("*.tar"))[2]
    data = bytearray(shard.read_bytes())
    view = RowView(str(folder), "train", 16)
    where = view._members[-1][1]["data_offset"] + 3
    data[where] ^= 4
    shard.write_bytes(data)
    view = RowView(str(folder), "train", 16)
    view.row(0)
    with pytest.raises(ValueError, match=f"{shard.name}: damaged within bytes 0 to {len(data)}"):
        view.row(view.num_rows - 1)
