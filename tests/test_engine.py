"""Engines: every ZeRO stage against plain PyTorch, the DeepSpeed config, optimizers that can be sliced, lost ranks."""

import os
import time
from typing import Any

import pytest
import ranks
import torch
from engine_jobs import follow, in_turn, lost_peer, make_run
from torch import nn

from conf.registry import OPTIMIZERS
from trainer.distributed import RankInfo, stale_locks
from trainer.engines import build_engine
from trainer.optim import parameter_groups, refuse_unsliceable, state_pattern

STEPS = 50


def farthest(rows: list[list[float]], others: list[list[float]], column: int) -> float:
    return max(abs(a[column] - b[column]) for a, b in zip(rows, others, strict=True))


@pytest.fixture(scope="module")
def plain() -> Any:
    return ranks.results(ranks.launch(2, follow, {"engine": "plain"}, STEPS))[0]


@pytest.mark.dist
def test_the_plain_engine_learns_and_does_not_depend_on_the_world_size(plain: Any) -> None:
    alone = ranks.results(ranks.launch(1, follow, {"engine": "plain"}, STEPS))[0]
    assert plain["rows"][0][0] - plain["rows"][-1][0] > 0.5
    assert max(row[1] for row in plain["rows"]) > 1.0, "clipping must have been at work"
    assert alone["first"] == plain["first"]
    assert farthest(alone["rows"], plain["rows"], 0) < 1e-5


@pytest.fixture(scope="module")
def zero() -> Any:
    """Stage -> what both ranks say."""
    said = ranks.results(ranks.launch(2, in_turn, follow, [[{"stage": s}, STEPS] for s in range(4)], timeout_s=240))
    return list(zip(*said, strict=True))


@pytest.fixture(scope="module")
def bf16() -> Any:
    """Stage -> what both ranks say of a few steps in bf16."""
    calls = [[{"stage": s, "precision": "bf16"}, 8] for s in range(4)]
    return list(zip(*ranks.results(ranks.launch(2, in_turn, follow, calls, timeout_s=240)), strict=True))


@pytest.mark.dist
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_follows_the_plain_engine(plain: Any, zero: Any, stage: int) -> None:
    first, second = zero[stage]
    assert first["first"] == plain["first"], "initial weights are the same bytes"
    assert first["rows"] == second["rows"], "every rank reports the same loss and gradient norm"
    assert farthest(first["rows"], plain["rows"], 0) < 1e-5
    assert farthest(first["rows"], plain["rows"], 1) < 1e-4
    assert first["eval"] == pytest.approx(plain["eval"], rel=1e-6)


@pytest.mark.dist
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_keeps_fp32_weights_and_stays_near_fp32(plain: Any, bf16: Any, stage: int) -> None:
    rank, _ = bf16[stage]
    assert rank["first"] == plain["first"], "the fp32 weights are not rounded to bf16"
    assert 0 < farthest(rank["rows"], plain["rows"][:8], 0) < 0.02


@pytest.mark.dist
def test_the_others_fail_within_seconds_when_a_rank_is_killed() -> None:
    began = time.monotonic()
    survivor, killed = ranks.launch(2, lost_peer)
    assert killed.code == -9
    assert survivor.code == 1 and survivor.error is not None
    assert time.monotonic() - began < 50, "the deadline of collectives is 60 s, the error comes before it"


@pytest.mark.unit
def test_the_config_says_what_deepspeed_would_choose_by_itself() -> None:
    from trainer.engine_deepspeed import deepspeed_config

    run = make_run(stage=2, reduce_bucket_size=1000)
    run.train.clip_norm = 0.0
    config = deepspeed_config(run, 3)
    assert config["gradient_clipping"] == 0.0
    assert config["zero_optimization"] == {"reduce_bucket_size": 1000, "stage": 2}
    assert config["zero_allow_untested_optimizer"] is True
    assert not {"optimizer", "scheduler", "checkpoint", "tensorboard", "wandb", "fp16", "bf16"} & set(config)
    assert deepspeed_config(make_run(stage=1, precision="bf16"), 1)["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.unit
@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("round_robin_gradients", "wrong parameters' names"),
        ("offload_optimizer", "not yet proven"),
        ("stage", "use zero.stage"),
        ("reduce_bucket_sizes", "did you mean 'reduce_bucket_size'?"),
    ],
)
def test_settings_that_break_checkpoints_are_refused(key: str, words: str) -> None:
    from trainer.engine_deepspeed import deepspeed_config

    run = make_run(stage=1)
    run.zero.extra = {key: True}
    with pytest.raises(ValueError, match=f"^zero.extra.{key}=") as caught:
        deepspeed_config(run, 2)
    assert words in str(caught.value)


class WholeMatrix(torch.optim.SGD):
    """Updates with the direction of the whole gradient."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.div_(p.grad.norm() + 1e-6)
        super().step()


@pytest.mark.unit
def test_an_optimizer_that_needs_whole_matrices_is_refused_and_elementwise_ones_are_not() -> None:
    @OPTIMIZERS.register("test_whole_matrix")
    def whole_matrix(groups: Any, config: Any) -> Any:
        return WholeMatrix(groups, lr=config.lr, momentum=0.9)

    @OPTIMIZERS.register("test_momentum")
    def momentum(groups: Any, config: Any) -> Any:
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)

    run = make_run(stage=1)
    refuse_unsliceable(run)
    run.optim.name = "test_momentum"
    refuse_unsliceable(run)
    assert state_pattern(run) == {"momentum_buffer": None}
    run.optim.name = "test_whole_matrix"
    with pytest.raises(ValueError, match=r"^optim.name=test_whole_matrix: .*zero.stage=1"):
        refuse_unsliceable(run)


@pytest.mark.unit
def test_only_matrices_decay() -> None:
    groups = parameter_groups(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), make_run().optim)
    assert [(g["weight_decay"], [p.ndim for p in g["params"]]) for g in groups] == [(0.1, [2]), (0.0, [1, 1, 1])]


@pytest.mark.unit
def test_a_model_with_values_outside_the_checkpoint_is_refused() -> None:
    run, frozen = make_run(engine="plain"), nn.Linear(2, 2)
    frozen.weight.requires_grad_(False)
    for module, word in ((frozen, "weight is frozen"), (nn.BatchNorm1d(3), "num_batches_tracked")):
        with pytest.raises(ValueError, match=word):
            build_engine(run, module, RankInfo(), torch.device("cpu"))


@pytest.mark.unit
def test_a_rank_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK=2"):
        RankInfo.from_env()


@pytest.mark.unit
def test_locks_of_builds_that_died_are_found(tmp_path: Any) -> None:
    for name, age_s in (("old", 3600), ("new", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        os.utime(tmp_path / name / "lock", (time.time() - age_s,) * 2)
    assert stale_locks(str(tmp_path)) == [str(tmp_path / "old" / "lock")]


@pytest.mark.dist
def test_ranks_that_do_not_all_come_are_a_timeout() -> None:
    from trainer.distributed import meet

    os.environ["MASTER_PORT"] = str(ranks.free_port())
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="rank 0 of 2 waited 1 s"):
        meet(RankInfo(0, 2, 0), timeout_s=1)
    assert time.monotonic() - began < 10
