"""The stages together: same bytes whatever the order, the kills, the disk or the place; nothing finished is redone."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from conf.identity import content_hash
from conf.schema import Corpus, Data, Paths, Run, Tokenizer
from data_pipeline import stages, store
from data_pipeline.manifest import Manifest

pytestmark = pytest.mark.unit


def write_corpus(folder: Path, count: int = 120) -> None:
    folder.mkdir(parents=True)
    words = random.Random(4)
    for i in range(count):
        text = " ".join(f"w{words.randrange(300)}" for _ in range(words.randrange(5, 200)))
        (folder / f"doc-{i:03d}.txt").write_text(text)
    (folder / "bad.txt").write_bytes(b"\xff\xfe\xff")


def make_run(folder: Path, **data: Any) -> Run:
    return Run(
        paths=Paths(store=str(folder / "store")),
        corpus=Corpus(path=str(folder / "raw")),
        tokenizer=Tokenizer(vocab_size=320),
        data=Data(**{"task_bytes": 10_000, "heldout_fraction": 0.1, "filters": {"min_words": {"limit": 10}}, **data}),
    )


def execute(run: Run, shuffle: int | None = None, times: int = 1) -> list[Manifest]:
    """Run all stages in this process, the tasks in some order, each `times` times."""
    manifests: list[Manifest] = []
    for build in stages.plan(run):
        work = build(*manifests)
        tasks = work.tasks() * times
        if shuffle is not None:
            random.Random(shuffle).shuffle(tasks)
        for task in tasks:
            spec, plain = json.loads(json.dumps([work.spec(), task]))
            summary = stages.run_task(spec, plain)
            assert json.loads(json.dumps(summary)) == summary
        manifests.append(work.finish())
    return manifests


def contents(manifests: list[Manifest]) -> list[str]:
    return [m.content_sha256 for m in manifests]


def files(folder: str) -> dict[str, bytes]:
    """Everything below a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[Path, list[Manifest]]:
    folder = tmp_path_factory.mktemp("reference")
    write_corpus(folder / "raw")
    return folder, execute(make_run(folder))


def test_the_whole_way(reference):
    folder, manifests = reference
    ready = stages.prepared(make_run(folder))
    assert ready is not None
    accounting = ready.accounting
    assert accounting["read"] == 121 and accounting["quarantined"] == {"not_utf8": 1}
    assert accounting["filtered"]["too_few_words"] > 0
    tokens = ready.manifest
    assert tokens.counts["train"]["documents"] + tokens.counts["heldout"]["documents"] == accounting["kept"]
    assert len([s for s in tokens.shards if s["split"] == "train"]) > 3
    for split in ("train", "heldout"):
        view = ready.view(split, 16)
        view.verify()
        flat = np.concatenate([view.row(i)[0][:-1] for i in range(view.num_rows)])
        assert tokens.counts[split]["tokens"] - 17 <= len(flat) <= tokens.counts[split]["tokens"]
        shown = [t for s in tokens.shards if s["split"] == split for t in [s["tokens"]]]
        assert sum(shown) == tokens.counts[split]["tokens"]
    sizes, counts = ready.token_bytes(), ready.token_counts()
    assert (counts * sizes).sum() == tokens.counts["train"]["text_bytes"]
    assert counts.sum() == tokens.counts["train"]["tokens"] - tokens.counts["train"]["documents"]
    assert tokens.tokenizer_sha256 == manifests[1].tokenizer_sha256
    again = stages.prepared_at(ready.tokens)
    assert (again.documents, again.tokenizer, again.tokens) == (ready.documents, ready.tokenizer, ready.tokens)


def test_golden_contents(reference):
    """When this fails, bump the operation's OPERATION_VERSIONS: one key must never stand for two contents."""
    _, manifests = reference
    folder = _folder(reference[0], manifests[0])
    indexes = sorted(Path(folder).glob("documents/*.parquet"))
    rows = [{**row, "sha256": row["sha256"].hex()} for p in indexes for row in pq.read_table(p).to_pylist()]
    found = {"documents": content_hash(rows), "tokenizer": contents(manifests)[1], "tokens": contents(manifests)[2]}
    assert found == {
        "documents": "6d3bbb853b3995fbca6182e968a55c94e70306e4ea780e3eae80cd4a7f3a74e9",
        "tokenizer": "7894efab8b0d9d4c7d176294dbbf73fb214fb764f801697f8c5c184e160b88ef",
        "tokens": "76bc6ba3b92d1e0ebe28125b80b2473c03c247fb4262288f9553af83f6fb3449",
    }


def test_the_order_of_tasks_and_doing_them_twice_change_nothing(reference, tmp_path):
    folder, manifests = reference
    shutil.copytree(folder / "raw", tmp_path / "raw")  # copy2 keeps the times, so the keys are equal too
    found = execute(make_run(tmp_path), shuffle=1, times=2)
    assert contents(found) == contents(manifests)
    for a in found:
        name = f"{a.stage}/{a.key[:20]}"
        assert files(str(tmp_path / "store" / name)) == files(str(folder / "store" / name))


def test_a_moved_corpus_is_the_same_and_a_touched_file_is_only_read_again(reference, tmp_path):
    folder, manifests = reference
    shutil.copytree(folder / "raw", tmp_path / "elsewhere" / "raw")
    run = make_run(tmp_path / "elsewhere")
    run.paths.store = str(tmp_path / "store")
    shutil.copytree(folder / "store", tmp_path / "store")
    assert stages.prepared(run) is not None
    os.utime(tmp_path / "elsewhere" / "raw" / "doc-007.txt", (1, 1))
    assert stages.prepared(run) is None
    read = stages.documents_work(run)
    for task in read.tasks():
        stages.run_task(read.spec(), task)
    made = read.finish()
    assert made.key != manifests[0].key and made.content_sha256 == manifests[0].content_sha256
    assert stages.prepared(run) is not None, "same content: the stages after it are done"


def test_nothing_finished_is_done_again(reference):
    folder, _ = reference
    run = make_run(folder)
    before = {p: p.stat().st_mtime_ns for p in (folder / "store").rglob("*")}
    manifests: list[Manifest] = []
    for build in stages.plan(run):
        work = build(*manifests)
        assert work.done() and all(work.task_done(t) for t in work.tasks())
        assert not any(stages.run_task(work.spec(), t)["computed"] for t in work.tasks())
        manifests.append(Manifest.load(work.folder))
    assert {p: p.stat().st_mtime_ns for p in (folder / "store").rglob("*")} == before


def test_scientific_keys_change_the_folder_and_operational_ones_do_not(reference):
    folder, manifests = reference
    for changes in ({"task_bytes": 9_999}, {"heldout_fraction": 0.11}, {"filters": {"min_words": {"limit": 11}}}):
        assert stages.documents_work(make_run(folder, **changes)).folder != _folder(folder, manifests[0])
    run = make_run(folder, row_tokens=16, quarantine_limit=0.5)
    run.cluster.workers = 7
    assert [b(*manifests[:i]).folder for i, b in enumerate(stages.plan(run))] == [_folder(folder, m) for m in manifests]


def _folder(folder: Path, made: Manifest) -> str:
    return str(folder / "store" / made.stage / made.key[:20])


def test_a_damaged_or_lost_result_is_seen_and_made_again(reference, tmp_path):
    folder, manifests = reference
    shutil.copytree(folder / "raw", tmp_path / "raw")
    shutil.copytree(folder / "store", tmp_path / "store")
    run = make_run(tmp_path)
    work = stages.tokens_work(run, *manifests[:2])
    path = Path(work.folder) / "tasks" / "task-00001.json"
    path.write_text(path.read_text().replace("1", "2", 1))
    (Path(work.folder) / "train-00002.tar").unlink()
    (Path(work.folder) / "manifest.json").write_text("{")
    assert not work.done()
    assert [work.task_done(t) for t in work.tasks()][:4] == [True, False, False, True]
    computed = [stages.run_task(work.spec(), t)["computed"] for t in work.tasks()]
    assert computed[:4] == [False, True, True, False]
    assert work.finish().content_sha256 == manifests[2].content_sha256


def test_finishing_early_is_an_error(reference, tmp_path):
    folder, _ = reference
    shutil.copytree(folder / "raw", tmp_path / "raw")
    work = stages.documents_work(make_run(tmp_path))
    stages.run_task(work.spec(), work.tasks()[0])
    with pytest.raises(AssertionError, match="not done"):
        work.finish()


CHILD = """
import os, resource, signal, sys
sys.path.insert(0, sys.argv[1])
import test_stages as t
from data_pipeline import store
from pathlib import Path
if sys.argv[3] == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))
if sys.argv[3] == "kill":
    left, fsync = int(sys.argv[4]), os.fsync
    def dying_fsync(fd):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(fd)
    os.fsync = dying_fsync
try:
    print(*t.contents(t.execute(t.make_run(Path(sys.argv[2])))))
except OSError as error:
    print("OSError", error.errno, type(error).__name__)
"""


def child(folder: Path, mode: str, number: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(folder), mode, str(number)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_killed_again_and_again_it_ends_with_the_same_bytes(reference, tmp_path):
    """SIGKILL at the n-th fsync, each time a little further: every fsync is inside some write."""
    folder, manifests = reference
    shutil.copytree(folder / "raw", tmp_path / "raw")
    for n in (9, 25, 17, 20):  # in documents, in the tokenizer, twice in tokens (28 + 10 + 48 fsyncs in all)
        assert child(tmp_path, "kill", n).returncode == -signal.SIGKILL
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("tasks/task-?????.json")}
    assert len(finished) > 7 and not list((tmp_path / "store" / "tokens").glob("*/manifest.json"))
    ended = child(tmp_path, "none", 0)
    assert ended.stdout.split() == contents(manifests), ended.stderr
    assert {p: p.stat().st_mtime_ns for p in finished} == finished, "what was finished was not redone"


def test_a_full_disk_is_an_oserror_and_keeps_no_half_file(reference, tmp_path):
    folder, manifests = reference
    shutil.copytree(folder / "raw", tmp_path / "raw")
    full = child(tmp_path, "full", 9_000)  # documents fit, the tokenizer does not
    assert full.stdout.startswith("OSError"), full.stderr
    left = [p for p in (tmp_path / "store").rglob("*") if p.is_file()]
    assert left and not [p for p in left if ".tmp-" in p.name]
    assert full.stderr == ""
    assert contents(execute(make_run(tmp_path))) == contents(manifests)


def test_a_full_disk_in_a_shard(reference, tmp_path, monkeypatch):
    folder, manifests = reference
    shutil.copytree(folder / "raw", tmp_path / "raw")
    shutil.copytree(folder / "store", tmp_path / "store")
    work = stages.tokens_work(make_run(tmp_path), *manifests[:2])
    shutil.rmtree(work.folder)

    def no_space(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        stages.run_task(work.spec(), work.tasks()[0])
    assert files(work.folder) == {}


def test_a_document_that_changed_behind_our_back_is_named(reference, tmp_path):
    folder, manifests = reference
    shutil.copytree(folder / "raw", tmp_path / "raw")
    shutil.copytree(folder / "store", tmp_path / "store")
    work = stages.tokens_work(make_run(tmp_path), *manifests[:2])
    shutil.rmtree(work.folder)
    path = tmp_path / "raw" / "doc-001.txt"
    was, text = path.stat(), path.read_text()
    path.write_text(text.replace("w", "v", 1))
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))  # same size, same time: only the hash can tell
    with pytest.raises(ValueError, match=r"doc-001\.txt"):
        stages.run_task(work.spec(), work.tasks()[0])


def test_nothing_kept_is_refused(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.txt").write_text("short")
    with pytest.raises(ValueError, match=r"data\.filters.*no document is kept"):
        execute(make_run(tmp_path))


def test_a_plugin_in_the_working_folder_is_found_by_workers_and_its_source_is_part_of_the_key(tmp_path, monkeypatch):
    source = (
        "from conf.registry import FILTERS\n\n@FILTERS.register('no_w7')\n"
        "def no_w7(text: str) -> str | None:\n    return 'has_w7' if 'w7' in text else None\n"
    )
    write_corpus(tmp_path / "raw", 20)
    keys = []
    for version, addition in enumerate(("", "# changed\n")):
        place = tmp_path / f"place{version}"
        place.mkdir()
        (place / "my_filters.py").write_text(source + addition)
        code = (
            "import json, sys; sys.path.insert(0, sys.argv[1]); import test_stages as t; from pathlib import Path;"
            "run = t.make_run(Path(sys.argv[2]), filters={'no_w7': {}}); run.plugins = ['my_filters'];"
            "m = t.execute(run); print(json.dumps([m[0].key, m[0].accounting]))"
        )
        command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
        out = subprocess.run(command, cwd=place, capture_output=True, text=True, check=True).stdout
        key, accounting = json.loads(out)
        assert accounting["filtered"]["has_w7"] > 0
        keys.append(key)
    assert keys[0] != keys[1]


def test_data_is_prepared_without_torch(reference, tmp_path):
    folder, manifests = reference
    shutil.copytree(folder / "raw", tmp_path / "raw")
    code = (
        "import sys\n"
        "for name in ('torch', 'deepspeed', 'transformers', 'wandb', 'ray', 'hydra'): sys.modules[name] = None\n"
        "sys.path.insert(0, sys.argv[1]); import test_stages as t; from pathlib import Path\n"
        "print(*t.contents(t.execute(t.make_run(Path(sys.argv[2])))))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.stdout.split() == contents(manifests), ended.stderr
