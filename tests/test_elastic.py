"""A checkpoint is free of world size and ZeRO stage: saved by one, continued by any other, as if nothing happened."""

from collections.abc import Iterator
from typing import Any

import pytest
import ranks
import torch
from engine_jobs import diverged, follow, forced_round_robin, in_turn, left_out, resume

from trainer import checkpoint
from trainer.checkpoint import Commit, SliceReader
from trainer.fragments import numel

SAVED_AT, END = 6, 14


@pytest.fixture(scope="module")
def zero1(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of 2 ranks under ZeRO-1 that was saved once and never interrupted."""
    folder = str(tmp_path_factory.mktemp("zero1"))
    found = ranks.results(ranks.launch(2, follow, {"stage": 1}, END, SAVED_AT, folder))
    return {"folder": folder, **found[0]}


@pytest.fixture(scope="module")
def zero3(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same under ZeRO-3."""
    folder = str(tmp_path_factory.mktemp("zero3"))
    found = ranks.results(ranks.launch(2, follow, {"stage": 3}, END, SAVED_AT, folder))
    return {"folder": folder, **found[0]}


def tensors(commit: Commit) -> Iterator[tuple[str, torch.Tensor]]:
    """Every whole tensor of a commit."""
    manifest = commit.manifest()
    reader = SliceReader(commit, manifest)
    for name, shape in manifest["tensors"].items():
        for kind in manifest["kinds"]:
            yield f"{kind} of {name}", reader(name, kind, 0, numel(shape))
    reader.close()


def continues(source: Any, world_size: int, everywhere: list[dict[str, Any]], tmp_path: Any) -> list[dict[str, Any]]:
    """Continue the saved run on other ranks; the losses must follow, the tensors must survive to the bit."""
    calls = [[options, source["folder"], f"{tmp_path}/{n}", END] for n, options in enumerate(everywhere)]
    found: list[dict[str, Any]] = ranks.results(ranks.launch(world_size, in_turn, resume, calls, timeout_s=240))[0]
    for (_, _, again, _), one in zip(calls, found, strict=True):
        assert (one["step"], one["tokens"]) == (SAVED_AT, 7)
        for row, expected in zip(one["rows"], source["rows"][SAVED_AT:], strict=True):
            assert row[0] == pytest.approx(expected[0], abs=1e-5)
            assert row[1] == pytest.approx(expected[1], abs=1e-4)
        same_tensors(source["folder"], again)
    return found


def same_tensors(folder: str, again: str) -> None:
    """What was loaded and saved again is the same, to the bit, whoever saved it."""
    first, _ = checkpoint.newest_valid(folder)
    second, _ = checkpoint.newest_valid(again)
    assert first is not None and second is not None
    assert first.manifest()["scalars"] == second.manifest()["scalars"]
    for (name, before), (other, after) in zip(tensors(first), tensors(second), strict=True):
        assert name == other and torch.equal(before.view(torch.int32), after.view(torch.int32)), name


@pytest.mark.dist
def test_zero1_on_two_ranks_continues_on_one_and_without_deepspeed(zero1: Any, tmp_path: Any) -> None:
    continues(zero1, 1, [{"engine": "plain"}, {"stage": 0}, {"stage": 2}, {"stage": 3}], tmp_path)


@pytest.mark.dist
def test_zero1_on_two_ranks_continues_on_two_and_under_its_own_stage_to_the_bit(zero1: Any, tmp_path: Any) -> None:
    own, *_ = continues(zero1, 2, [{"stage": 1}, {"stage": 0}, {"stage": 2}, {"stage": 3}], tmp_path)
    assert own["rows"] == zero1["rows"][SAVED_AT:]
    assert own["last"] == zero1["last"]


@pytest.mark.dist
def test_zero1_on_two_ranks_continues_on_three(zero1: Any, tmp_path: Any) -> None:
    continues(zero1, 3, [{"stage": 0}, {"stage": 2}, {"stage": 3}], tmp_path)


@pytest.mark.dist
def test_zero3_continues_to_the_bit_and_under_zero1_and_with_small_parameters_whole(zero3: Any, tmp_path: Any) -> None:
    (own,) = continues(zero3, 2, [{"stage": 3}], tmp_path / "own")
    assert own["last"] == zero3["last"]
    kept_whole = {"stage": 3, "stage3_param_persistence_threshold": 1000}
    continues(zero3, 2, [{"stage": 1}, kept_whole], tmp_path / "others")


@pytest.mark.dist
def test_all_values_are_in_it_once_with_two_decay_groups(zero1: Any) -> None:
    commit, _ = checkpoint.newest_valid(zero1["folder"])
    assert commit is not None
    state = dict(tensors(commit))
    assert {name.split(" ")[0] for name in state} == {"param", "exp_avg", "exp_avg_sq"}
    unmoved = [name for name, value in state.items() if name.startswith("exp_avg_sq") and not value.any()]
    assert unmoved == [], "every parameter of both groups has been stepped"


@pytest.mark.dist
def test_a_setting_that_misplaces_partitions_is_found_at_the_save(tmp_path: Any) -> None:
    heard = ranks.results(ranks.launch(2, forced_round_robin, str(tmp_path)))
    assert all("nothing was committed" in h for h in heard)
    assert any("weight: what would be saved" in h for h in heard), heard
    assert checkpoint.newest_valid(str(tmp_path)) == (None, [])


@pytest.mark.dist
def test_a_fragment_left_out_or_a_full_disk_commits_nothing(tmp_path: Any) -> None:
    first, second = ranks.results(ranks.launch(2, left_out, str(tmp_path)))
    assert "are missing; nothing was committed" in first[0] and ".weight: values" in first[0]
    assert "rank 0 could not save" in second[0]
    assert "rank 1 could not save" in first[1] and "No space left" in second[1]
    assert (first[2], second[2]) == ("", ""), "the next save, with everything there, is whole"
    commit, damaged = checkpoint.newest_valid(str(tmp_path))
    assert commit is not None and damaged == []


@pytest.mark.dist
def test_ranks_whose_weights_went_apart_commit_nothing(tmp_path: Any) -> None:
    heard = ranks.results(ranks.launch(2, diverged, str(tmp_path)))
    assert all(".weight: it is not the same on all ranks" in h for h in heard), heard
    assert checkpoint.newest_valid(str(tmp_path)) == (None, [])
