"""The order program: each row once an epoch, the same at any step and for any ranks, and only ever appended to."""

import json
import time

import numpy as np
import pytest

from data_pipeline.order import OrderProgram, Segment, permute

pytestmark = pytest.mark.unit


def program(rows: int, batch: int = 4, key: int = 0) -> OrderProgram:
    return OrderProgram.start(key, batch, rows, "view")


@pytest.mark.parametrize("key", [0, 1])
def test_a_permutation_for_every_number_of_rows(key):
    for rows in range(1, 201):
        seen = permute(np.arange(rows), rows, key, 3)
        assert np.array_equal(np.sort(seen), np.arange(rows)), rows


def test_a_permutation_of_a_billion_rows_without_a_table():
    rows = 10**9
    block = np.concatenate([np.arange(200_000), np.arange(rows - 200_000, rows)])
    seen = permute(block, rows, 7, 0)
    assert len(np.unique(seen)) == len(block)
    assert seen.min() >= 0 and seen.max() < rows
    assert abs(seen.mean() / rows - 0.5) < 0.01  # spread out, not near where they came from
    alone = [int(permute(np.array([p]), rows, 7, 0)[0]) for p in block[:5]]
    assert alone == seen[:5].tolist()


def test_small_permutations_look_shuffled():
    """Each row is at each position about equally often over keys, and neighbours part."""
    counts = np.zeros((10, 10))
    for key in range(2000):
        counts[np.arange(10), permute(np.arange(10), 10, key, 0)] += 1
    assert counts.min() > 120 and counts.max() < 290  # 200 expected, deviation 13


@pytest.mark.parametrize(("rows", "batch"), [(1, 3), (5, 4), (97, 8), (128, 128), (50, 64)])
def test_each_row_exactly_once_per_epoch(rows, batch):
    order = program(rows, batch)
    samples = np.concatenate([np.array(order.samples(s)) for s in range(-(-3 * rows // batch))])
    assert np.array_equal(samples, np.arange(len(samples)))
    epochs, chosen = order.locate(samples)
    for epoch in range(3):
        assert np.array_equal(np.sort(chosen[epochs == epoch]), np.arange(rows)) or epoch * rows > len(samples)
    if rows > 50:
        assert not np.array_equal(chosen[:rows], chosen[rows : 2 * rows]), "epochs must differ"


def test_the_key_and_nothing_else_decides():
    numbers = np.arange(300)
    same = program(1000, key=5).locate(numbers)[1]
    assert np.array_equal(program(1000, batch=7, key=5).locate(numbers)[1], same)
    assert not np.array_equal(program(1000, key=6).locate(numbers)[1], same)


def test_step_a_million_costs_what_step_ten_costs():
    order = program(10**9, batch=256)

    def seconds(step: int) -> float:
        began = time.perf_counter()
        for _ in range(20):
            order.locate(np.array(order.samples(step)))
        return time.perf_counter() - began

    seconds(0)
    early, late = min(seconds(10) for _ in range(5)), min(seconds(10**6) for _ in range(5))
    assert late < 3 * early
    assert early / 20 < 0.05


def continue_with(order: OrderProgram, step: int, batch: int, **changes: object) -> Segment:
    source = {"name": "corpus", "rows": order.segments[-1].sources[0]["rows"], "weight": 1.0}
    segment = Segment(
        from_step=step,
        from_sample=order.samples(step).start,
        batch_rows=batch,
        key=order.segments[-1].key,
        view="view",
        sources=[{**source, "start": order.next_place(step)}],
    )
    for name, value in changes.items():
        setattr(segment, name, value)
    return segment


def test_a_batch_ramp_loses_and_repeats_nothing():
    order = program(60, batch=2)
    order.append(continue_with(order, 5, 8))
    order.append(continue_with(order, 9, 3))
    samples = np.concatenate([np.array(order.samples(s)) for s in range(30)])
    assert np.array_equal(samples, np.arange(len(samples)))
    assert [len(order.samples(s)) for s in (4, 5, 8, 9)] == [2, 8, 8, 3]
    assert np.array_equal(order.locate(samples)[1], program(60).locate(samples)[1]), "only the batches changed"


def test_skipped_places_are_not_seen_and_the_rest_moves_up():
    order = program(40, batch=4)
    order.append(continue_with(order, 2, 4, skipped=[[12, 20]]))
    samples = np.concatenate([np.array(order.samples(s)) for s in range(8)])
    places = [*range(12), *range(20, 40)]
    assert np.array_equal(order.locate(samples)[1], program(40).locate(np.array(places))[1])
    order.append(continue_with(order, 4, 2))
    later = np.array(order.samples(4))
    assert np.array_equal(order.locate(later)[1], program(40).locate(np.array([24, 25]))[1])


def test_json_there_and_back_and_damage_is_seen():
    order = program(60)
    order.append(continue_with(order, 5, 8))
    value = json.loads(json.dumps(order.to_json()))
    back = OrderProgram.from_json(value)
    assert back == order and back.hash == order.hash != program(60).hash
    value["segments"][0]["key"] = 1
    with pytest.raises(ValueError, match="damaged"):
        OrderProgram.from_json(value)
    with pytest.raises(ValueError, match="version 99"):
        OrderProgram.from_json({**value, "version": 99})


def test_what_does_not_follow_is_refused():
    order = program(60)
    segment = continue_with(order, 5, 8)
    segment.from_sample += 1
    with pytest.raises(ValueError, match="step 5 begins at sample 20"):
        order.append(segment)
    order.append(continue_with(order, 5, 8))
    with pytest.raises(ValueError, match="only appended to"):
        order.append(continue_with(order, 3, 8))
    two = continue_with(order, 7, 8)
    two.sources = two.sources * 2
    with pytest.raises(ValueError, match="several sources"):
        order.append(two)
    with pytest.raises(ValueError, match=r"data\.row_tokens"):
        program(0)
