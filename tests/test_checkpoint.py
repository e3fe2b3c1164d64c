"""Checkpoints: damage is named and skipped, old gangs are fenced off, kills leave a whole commit or none."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from engine_jobs import follow, make_engine, make_run, saves, steps
from safetensors.torch import load_file
from torch import nn

from conf.refusal import BadRequest
from data_pipeline.store import NoValidCheckpoint, create_exclusive
from trainer import checkpoint, tensor_file
from trainer.checkpoint import CheckpointError, Commit, choose_base, newest_valid, prune, record_base, save
from trainer.distributed import RankInfo, barrier
from trainer.engine import Engine
from trainer.engines import build_engine
from trainer.fragments import Fragment, cover_error
from trainer.lineage import Superseded, bases
from trainer.state import TrainState

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def engine() -> Engine:
    """A plain engine of one rank, one step into training."""
    run = make_run(engine="plain")
    made = make_engine(run, RankInfo())
    steps(run, made, 0, 1)
    return made


def save_steps(engine: Engine, folder: Any, generation: int, *numbers: int) -> list[Commit]:
    return [save(engine, TrainState(step=n), str(folder), generation) for n in numbers]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "flipped bit in a weight": ("rank-00000.safetensors", lambda p: flip(p, p.stat().st_size - 50)),
    "flipped bit in the header": ("rank-00000.safetensors", lambda p: flip(p, 100)),
    "truncated tensors": ("rank-00000.safetensors", cut),
    "something appended": ("rank-00000.safetensors", lambda p: p.write_bytes(p.read_bytes() + b"\0")),
    "missing tensors": ("rank-00000.safetensors", lambda p: p.unlink()),
    "missing table": ("rank-00000.json", lambda p: p.unlink()),
    "flipped bit in the table": ("rank-00000.json", lambda p: flip(p, 200)),
    "damaged manifest": ("manifest.json", lambda p: flip(p, 300)),
    "truncated manifest": ("manifest.json", cut),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_commit_is_named_and_the_one_before_is_used(engine: Engine, kind: str, tmp_path: Path) -> None:
    older, newer = save_steps(engine, tmp_path, 1, 10, 20)
    name, harm = DAMAGES[kind]
    harm(Path(newer.folder) / name)
    found, damaged = newest_valid(str(tmp_path))
    assert found == older
    assert len(damaged) == 1 and damaged[0].startswith(f"{newer.folder}/{name}: ")


def test_loading_never_returns_damaged_values(engine: Engine, tmp_path: Path) -> None:
    (commit,) = save_steps(engine, tmp_path, 1, 10)
    flip(
        Path(commit.folder) / "rank-00000.safetensors", Path(commit.folder, "rank-00000.safetensors").stat().st_size - 9
    )
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: damaged between byte"):
        checkpoint.load(engine, commit)


def test_nothing_valid_is_none_with_every_reason(engine: Engine, tmp_path: Path) -> None:
    for commit in save_steps(engine, tmp_path, 1, 10, 20):
        cut(Path(commit.folder) / "rank-00000.safetensors")
    found, damaged = newest_valid(str(tmp_path))
    assert found is None and len(damaged) == 2
    assert newest_valid(str(tmp_path / "empty")) == (None, [])


def test_state_comes_back_and_commits_name_their_parent(engine: Engine, tmp_path: Path) -> None:
    state = TrainState(step=3, tokens=99, samples=18, metrics_bytes=5, seed=8, extra={"a": [1]})
    first = save(engine, state, str(tmp_path), 1)
    state.step = 4
    second = save(engine, state, str(tmp_path), 1)
    loaded = checkpoint.load(engine, second)
    assert (loaded.step, loaded.tokens, loaded.samples, loaded.seed, loaded.extra) == (4, 99, 18, 8, {"a": [1]})
    assert first.state().parent is None
    assert second.state().parent == first.name == "checkpoints/step-00000003/gen-0001"
    assert loaded.parent == second.name, "the next save continues this one"
    assert second.bytes > 0 and second.seconds > 0


def test_the_tensor_file_is_ordinary_safetensors(engine: Engine, tmp_path: Path) -> None:
    (commit,) = save_steps(engine, tmp_path, 1, 10)
    values = load_file(f"{commit.folder}/rank-00000.safetensors")
    weights = {f"param/{n}/0": p.detach().flatten() for n, p in engine.module.named_parameters()}
    assert all(torch.equal(values[key], weight) for key, weight in weights.items())
    assert len(values) == 3 * len(weights)


def test_a_slice_reads_only_its_chunks(tmp_path: Path) -> None:
    pieces = [Fragment("w", "param", 0, torch.arange(5000.0)), Fragment("w", "exp_avg", 0, torch.arange(5000.0) + 0.5)]
    facts, offsets = tensor_file.write(str(tmp_path / "x"), pieces, chunk_bytes=1024)
    file = tensor_file.VerifiedFile(str(tmp_path / "x"), facts)
    flip(tmp_path / "x", 30)
    assert file.values(offsets[1] + 4 * 600, 300).tolist() == [600.5 + i for i in range(300)]
    assert len(file.chunks) <= 3
    with pytest.raises(CheckpointError, match="x: damaged between byte 0 and 1024"):
        file.values(offsets[0], 1)
    with pytest.raises(CheckpointError, match="ends before byte"):
        file.values(offsets[1], 6000)


def test_another_model_or_optimizer_is_refused_by_name(engine: Engine, tmp_path: Path) -> None:
    (commit,) = save_steps(engine, tmp_path, 1, 10)
    run = make_run(engine="plain")
    other = build_engine(run, nn.Linear(3, 3), RankInfo(), torch.device("cpu"))
    with pytest.raises(BadRequest, match=r"^bias: has shape none in the checkpoint"):
        checkpoint.load(other, commit)


def test_the_cover_must_be_exact() -> None:
    shapes, whole = {"a": [2, 3], "b": [4]}, [("a", "param", 0, 4), ("b", "param", 0, 4), ("a", "param", 4, 2)]
    assert cover_error(shapes, {"param"}, whole) is None
    assert cover_error(shapes, {"param"}, whole[:2]) == "a: values 4 to 6 of param are missing"
    assert cover_error(shapes, {"param"}, [*whole, ("b", "param", 3, 1)]) == "b: values 3 to 4 of param are twice"
    assert cover_error(shapes, {"param"}, [w for w in whole if w[2]]) == "a: values 0 to 4 of param are missing"
    assert cover_error(shapes, {"param", "m"}, whole) == "a: values 0 to 6 of m are missing"
    assert "no such parameter" in str(cover_error(shapes, {"param"}, [*whole, ("c", "param", 0, 1)]))


def test_a_weight_changed_behind_the_partition_is_found(engine: Engine, tmp_path: Path) -> None:
    class Stale:
        """A holder whose fragments are copies that were left behind."""

        replicated = True

        def __init__(self, holder: Any) -> None:
            self.copies = [Fragment(f.name, f.kind, f.start, f.tensor.clone()) for f in holder.held()]
            self.inner = holder

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def held(self) -> Any:
            return iter(self.copies)

    run = make_run(engine="plain")
    made: Any = make_engine(run, RankInfo())
    made.holder = Stale(made.holder)
    name, weight = list(made.module.named_parameters())[2]
    with torch.no_grad():
        weight.view(-1)[-1] += 1
    with pytest.raises(CheckpointError, match=f"^{name}: what would be saved"):
        save_steps(made, tmp_path, 1, 1)
    assert newest_valid(str(tmp_path)) == (None, [])


def test_a_late_commit_of_an_old_gang_is_ignored(engine: Engine, tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert choose_base(folder, 1, 0) == (None, [])
    _, second = save_steps(engine, folder, 1, 10, 20)
    assert choose_base(folder, 2, 0) == (second, [])
    with pytest.raises(Superseded, match="generation 2 has started, this is generation 1; nothing was committed"):
        save_steps(engine, folder, 1, 30)
    os.rename(f"{folder}/generations/gen-0002.base.json", f"{folder}/aside")
    (late,) = save_steps(engine, folder, 1, 40)
    os.rename(f"{folder}/aside", f"{folder}/generations/gen-0002.base.json")
    assert os.path.exists(late.manifest_path)
    assert newest_valid(folder) == (second, []), (
        "written in the instant between check and publishing, and still ignored"
    )
    (own,) = save_steps(engine, folder, 2, 25)
    assert newest_valid(folder) == (own, [])
    with pytest.raises(CheckpointError, match="generation 2 was started before"):
        record_base(folder, 2, None)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_gang_that_comes_after_a_newer_one_is_refused_before_it_starts(
    engine: Engine, tmp_path: Path, rank: int
) -> None:
    folder = str(tmp_path)
    assert choose_base(folder, 2, 0) == (None, [])
    (own,) = save_steps(engine, folder, 2, 10)
    with pytest.raises(Superseded, match="another driver has taken over this run: generation 2 has started"):
        choose_base(folder, 1, rank)
    with pytest.raises(Superseded):
        record_base(folder, 1, own)
    assert bases(folder) == [2], "nothing is recorded for it"
    assert newest_valid(folder) == (own, [])


@pytest.mark.parametrize("instant", ["before", "after"])
def test_of_two_gangs_that_start_at_once_the_older_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instant: str
) -> None:
    folder = str(tmp_path)

    def create_with_another(path: str, data: bytes) -> bool:
        monkeypatch.setattr("trainer.lineage.create_exclusive", create_exclusive)
        if instant == "before":
            record_base(folder, 2, None)
        created = create_exclusive(path, data)
        if instant == "after":
            record_base(folder, 2, None)
        return created

    monkeypatch.setattr("trainer.lineage.create_exclusive", create_with_another)
    with pytest.raises(Superseded):
        choose_base(folder, 1, 0)
    assert choose_base(folder, 3, 0) == (None, []), "it hinders no newer one"


def save_late(rank: RankInfo, folder: str) -> None:
    """A save after another gang has started in the same run."""
    engine = make_engine(make_run(stage=1), rank)
    choose_base(folder, 1, rank.rank)
    barrier()
    if rank.rank == 0:
        record_base(folder, 2, None)
    save(engine, TrainState(step=1), folder, 1)


@pytest.mark.dist
def test_every_rank_of_a_superseded_gang_hears_why(tmp_path: Path) -> None:
    folder = str(tmp_path)
    record_base(folder, 2, None)
    ends = ranks.launch(2, saves, {"stage": 1}, folder, [2], 1)
    assert ["Superseded" in str(end.error) for end in ends] == [True, True], "at the start"
    ends = ranks.launch(2, save_late, f"{folder}/late")
    assert ["Superseded" in str(end.error) for end in ends] == [True, True], "at a save"


def test_nothing_whole_is_refused_until_restored(engine: Engine, tmp_path: Path) -> None:
    folder = str(tmp_path)
    choose_base(folder, 1, 0)
    (only,) = save_steps(engine, folder, 1, 10)
    path = Path(only.folder) / "rank-00000.safetensors"
    sound = path.read_bytes()
    cut(path)
    for rank in (0, 1):
        with pytest.raises(NoValidCheckpoint, match=r"run\.fresh=true"):
            choose_base(folder, 2, rank)
    path.write_bytes(sound)
    assert choose_base(folder, 3, 0) == (only, [])
    shutil.rmtree(f"{folder}/checkpoints")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(NoValidCheckpoint, match="there is none"):
        choose_base(folder, 4, 0)


def test_a_damaged_newest_is_not_the_base_and_stays_out(engine: Engine, tmp_path: Path) -> None:
    folder = str(tmp_path)
    choose_base(folder, 1, 0)
    first, second = save_steps(engine, folder, 1, 10, 20)
    path = Path(second.folder) / "rank-00000.safetensors"
    sound = path.read_bytes()
    cut(path)
    base, damaged = choose_base(folder, 2, 0)
    assert base == first and len(damaged) == 1
    path.write_bytes(sound)
    assert newest_valid(folder) == (first, []), "repaired later, it is still not part of what generation 2 continues"
    save_steps(engine, folder, 2, 15, 20)
    assert [(c.step, c.generation) for c in checkpoint.lineage(folder)] == [(20, 2), (15, 2), (10, 1)]


def test_pruning_keeps_the_last_and_never_the_only_valid_one(engine: Engine, tmp_path: Path) -> None:
    folder = str(tmp_path)
    commits = save_steps(engine, folder, 1, 10, 20, 30, 40)
    assert prune(folder, 2) == commits[:2]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000030", "step-00000040"]
    newer = save_steps(engine, folder, 1, 50, 60)
    for commit in newer:
        cut(Path(commit.folder) / "rank-00000.safetensors")
    assert prune(folder, 2) == []
    assert newest_valid(folder)[0] == commits[3]


def test_pruning_clears_what_dead_gangs_left_and_not_what_is_being_written(engine: Engine, tmp_path: Path) -> None:
    folder = str(tmp_path)
    choose_base(folder, 1, 0)
    save_steps(engine, folder, 1, 10)
    (tmp_path / "checkpoints/step-00000020/gen-0001").mkdir(parents=True)
    choose_base(folder, 2, 0)
    (tmp_path / "checkpoints/step-00000030/gen-0002").mkdir(parents=True)
    save_steps(engine, folder, 2, 20)
    assert prune(folder, 2, generation=1) == [], "a gang that was replaced removes nothing"
    assert [c.name for c in prune(folder, 2, generation=2)] == ["checkpoints/step-00000020/gen-0001"]
    assert (tmp_path / "checkpoints/step-00000030/gen-0002").is_dir()


def test_a_step_is_committed_once(engine: Engine, tmp_path: Path) -> None:
    save_steps(engine, tmp_path, 1, 10)
    with pytest.raises(CheckpointError, match="a commit of this step already"):
        save_steps(engine, tmp_path, 1, 10)


def test_a_checkpoint_of_another_version_is_refused(engine: Engine, tmp_path: Path) -> None:
    (commit,) = save_steps(engine, tmp_path, 1, 10)
    value = json.loads(Path(commit.manifest_path).read_text())
    from data_pipeline.store import json_bytes, seal

    Path(commit.manifest_path).write_bytes(json_bytes(seal({**value, "version": 2})))
    with pytest.raises(CheckpointError, match="checkpoint version 2, this program reads 1"):
        checkpoint.load(engine, commit)


POINTS = ["before_tensors", "in_tensors", "after_tensors", "before_manifest", "after_manifest", "in_prune"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as the ranks have: the sums of a matrix product depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.chaos
@pytest.mark.parametrize("where", POINTS)
@pytest.mark.usefixtures("one_thread")
def test_killed_anywhere_inside_a_save_it_continues_to_the_same_weights(
    where: str, engine: Engine, tmp_path: Path
) -> None:
    folder, options, numbers = str(tmp_path), {"engine": "plain"}, [2, 4, 6]
    times = {"in_tensors": len(list(engine.fragments())) + 5, "in_prune": 1}.get(where, 2)
    (end,) = ranks.launch(1, saves, options, folder, numbers, 1, ZERORAY_KILL_AT=f"checkpoint.{where}:{times}")
    assert end.code == -9, "the fault must have happened"
    found, damaged = newest_valid(folder)
    assert damaged == [], "a kill never leaves a commit that is not whole"
    assert found is not None and found.step == {"after_manifest": 4, "in_prune": 6}.get(where, 2)
    continued = saves(RankInfo(), options, folder, numbers, 2)
    assert newest_valid(folder) == (Commit(folder, 6, 1 if where == "in_prune" else 2), [])
    assert continued == saves(RankInfo(), options, f"{folder}/uninterrupted", numbers)


@pytest.mark.dist
@pytest.mark.chaos
def test_a_gang_killed_inside_a_save_continues_to_the_same_weights(tmp_path: Path) -> None:
    folder, options = str(tmp_path), {"stage": 1}
    first, second = ranks.launch(2, saves, options, folder, [2, 4], 1, ZERORAY_KILL_AT="checkpoint.before_manifest:2")
    assert first.code == -9
    assert second.error is not None, "the other rank fails too, and does not wait for ever"
    assert newest_valid(folder) == (Commit(folder, 2, 1), [])
    continued = ranks.results(ranks.launch(2, saves, options, folder, [4], 2))
    whole = ranks.results(ranks.launch(2, follow, options, 4))
    assert continued[0] == [whole[0]["last"]]


def test_a_damaged_record_of_a_base_hides_no_checkpoint(engine: Engine, tmp_path: Path) -> None:
    folder = str(tmp_path)
    choose_base(folder, 1, 0)
    first, second = save_steps(engine, folder, 1, 10, 20)
    choose_base(folder, 2, 0)
    record = tmp_path / "generations" / "gen-0002.base.json"
    for position in range(0, len(record.read_bytes()), 7):
        sound = record.read_bytes()
        record.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
        base, damaged = newest_valid(folder)
        assert base == second
        assert str(record) in damaged[0]
        record.write_bytes(sound)
    (own,) = save_steps(engine, folder, 2, 30)
    record.write_bytes(b"{")
    assert choose_base(folder, 3, 0)[0] == own
    assert first in checkpoint.lineage(folder)


def test_a_commit_whose_metrics_are_gone_is_passed_over(engine: Engine, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    choose_base(str(tmp_path), 1, 0)
    metrics.write_bytes(b"x" * 100)
    first = save(engine, TrainState(step=10, metrics_bytes=50), str(tmp_path), 1)
    second = save(engine, TrainState(step=20, metrics_bytes=100), str(tmp_path), 1)
    assert newest_valid(str(tmp_path)) == (second, [])
    metrics.write_bytes(b"x" * 99)
    base, damaged = newest_valid(str(tmp_path))
    assert base == first
    assert damaged == [f"{metrics}: ends at byte 99, {second.name} needs 100"]
