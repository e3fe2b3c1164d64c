"""Batches: the union over ranks is the order of one rank, whatever the world size; shapes agree; padding is inert."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from test_packing import make_docs, store_documents

from data_pipeline.order import OrderProgram
from data_pipeline.packing import RowView
from data_pipeline.stream import Batch, TrainStream, heldout_batches

pytestmark = pytest.mark.unit
LENGTH = 24
SIZES = np.arange(5000, dtype=np.int32) % 7


@pytest.fixture(scope="module")
def view(tmp_path_factory) -> RowView:
    folder: Path = tmp_path_factory.mktemp("tokens")
    store_documents(folder, [make_docs(4, 70), make_docs(5, 70)])
    return RowView(str(folder), "train", LENGTH)


def stream(view: RowView, batch_rows: int) -> TrainStream:
    return TrainStream(view, OrderProgram.start(3, batch_rows, view.num_rows, view.view_hash), SIZES)


def real_rows(batches: list[Batch]) -> list[tuple[int, list[int], list[int]]]:
    """(sample id, input_ids, labels) of the rows that are no padding, in order."""
    out = []
    for batch in batches:
        for place, sample in enumerate(batch.sample_ids):
            out.append((sample, batch.input_ids[place].tolist(), batch.labels[place].tolist()))
    return out


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("batch_rows", [1, 6, 16])
def test_the_ranks_together_see_what_one_rank_sees(view, world_size, batch_rows):
    source = stream(view, batch_rows)
    for step in (0, 1, 50, 10**6):
        alone = source.micro_batches(step, 0, 1, 100)
        assert [s for b in alone for s in b.sample_ids] == list(range(step * batch_rows, (step + 1) * batch_rows))
        ranks = [source.micro_batches(step, rank, world_size, 2) for rank in range(world_size)]
        assert [row for batches in ranks for row in real_rows(batches)] == real_rows(alone)
        shapes = [[tuple(b.input_ids.shape) for b in batches] for batches in ranks]
        assert all(s == shapes[0] for s in shapes)
        assert sum(b.num_labels for batches in ranks for b in batches) == alone[0].num_labels
        assert sum(b.text_bytes for batches in ranks for b in batches) == alone[0].text_bytes


def test_a_batch_says_what_the_model_needs(view):
    source = stream(view, 5)
    batch = source.micro_batches(7, 1, 2, 8)[0]
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (3, LENGTH)
    assert (batch.input_ids.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int32)
    _, rows = source.order.locate(np.array(batch.sample_ids))
    bounds = batch.cu_seqlens.tolist()
    assert bounds[0] == 0 and bounds[-1] == 3 * LENGTH and bounds == sorted(set(bounds))
    assert set(range(0, 3 * LENGTH, LENGTH)) <= set(bounds)
    expected = [p for a, b in itertools.pairwise(bounds) for p in range(b - a)]
    assert batch.position_ids.flatten().tolist() == expected
    for place, row in enumerate(rows.tolist()):
        ids, labels, starts = view.example(row)
        assert batch.input_ids[place].tolist() == ids.tolist()
        assert batch.labels[place].tolist() == labels.tolist()
        assert {place * LENGTH + s for s in starts.tolist()} <= set(bounds)
    predicted = batch.labels[batch.labels != -100]
    assert batch.num_labels == len(predicted)
    assert batch.text_bytes == int(SIZES[predicted.numpy()].sum())


def test_padding_rows_have_no_labels_and_no_samples(view):
    batches = [stream(view, 3).micro_batches(0, rank, 8, 4)[0] for rank in range(8)]
    empty = [b for b in batches if not b.sample_ids]
    assert len(empty) == 5
    for batch in empty:
        assert batch.input_ids.shape == (1, LENGTH)
        assert bool((batch.labels == -100).all())
        assert (batch.num_labels, batch.text_bytes, batch.cu_seqlens.tolist()) == (0, 0, [0, LENGTH])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_held_out_rows_are_shared_out_once(view, world_size):
    ranks = [list(heldout_batches(view, SIZES, rank, world_size, 4, 10)) for rank in range(world_size)]
    assert [s for batches in ranks for b in batches for s in b.sample_ids] == list(range(10))
    assert len({len(batches) for batches in ranks}) == 1
    everything = [s for b in heldout_batches(view, SIZES, 0, 1, 4, 10**9) for s in b.sample_ids]
    assert everything == list(range(view.num_rows))


def test_rows_of_another_view_are_refused(view):
    source = stream(view, 4)
    source.view = RowView(view.folder, "train", LENGTH + 1)
    with pytest.raises(ValueError, match="planned for other rows"):
        source.micro_batches(0, 0, 1, 4)


def test_moving_a_batch_keeps_its_facts(view):
    batch = stream(view, 4).micro_batches(0, 0, 1, 4)[0]
    moved = batch.to("cpu")
    assert all(torch.equal(a, b) for a, b in zip(moved.tensors().values(), batch.tensors().values(), strict=True))
    assert (moved.num_labels, moved.sample_ids) == (batch.num_labels, batch.sample_ids)
