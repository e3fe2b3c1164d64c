"""A checkpoint is free of world size and ZeRO stage: saved by one, continued by any other, as if nothing happened."""

from collections.abc import Iterator
from typing import Any

import pytest
import ranks
import torch
from engine_jobs import diverged, follow, forced_round_robin, left_out, resume

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


def continues(source: Any, world_size: int, options: dict[str, Any], tmp_path: Any) -> dict[str, Any]:
    """Continue the saved run on other ranks; the losses must follow, the tensors must survive to the bit."""
    again = str(tmp_path / "again")
    found = ranks.results(ranks.launch(world_size, resume, options, source["folder"], again, END))[0]
    assert (found["step"], found["tokens"]) == (SAVED_AT, 7)
    for row, expected in zip(found["rows"], source["rows"][SAVED_AT:], strict=True):
        assert row[0] == pytest.approx(expected[0], abs=1e-5)
        assert row[1] == pytest.approx(expected[1], abs=1e-4)
    first, _ = checkpoint.newest_valid(source["folder"])
    second, _ = checkpoint.newest_valid(again)
    assert first is not None and second is not None
    assert first.manifest()["scalars"] == second.manifest()["scalars"]
    for (name, before), (other, after) in zip(tensors(first), tensors(second), strict=True):
        assert name == other and torch.equal(before.view(torch.int32), after.view(torch.int32)), name
    return found


@pytest.mark.dist
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_zero1_on_two_ranks_continues_anywhere(zero1: Any, world_size: int, stage: int, tmp_path: Any) -> None:
    continues(zero1, world_size, {"stage": stage}, tmp_path)


@pytest.mark.dist
def test_it_continues_without_deepspeed(zero1: Any, tmp_path: Any) -> None:
    continues(zero1, 1, {"engine": "plain"}, tmp_path)


@pytest.mark.dist
def test_the_same_ranks_and_stage_continue_to_the_bit(zero1: Any, tmp_path: Any) -> None:
    found = continues(zero1, 2, {"stage": 1}, tmp_path)
    assert found["rows"] == zero1["rows"][SAVED_AT:]
    assert found["last"] == zero1["last"]


@pytest.mark.dist
def test_zero3_continues_to_the_bit_on_the_same_ranks(zero3: Any, tmp_path: Any) -> None:
    assert continues(zero3, 2, {"stage": 3}, tmp_path)["last"] == zero3["last"]


@pytest.mark.dist
def test_zero3_continues_under_zero1_and_with_small_parameters_kept_whole(zero3: Any, tmp_path: Any) -> None:
    continues(zero3, 3, {"stage": 1}, tmp_path)
    (tmp_path / "kept").mkdir()
    continues(zero3, 2, {"stage": 3, "stage3_param_persistence_threshold": 1000}, tmp_path / "kept")


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
