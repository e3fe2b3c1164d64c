"""The command line: every way to end has its exit code and its few lines, and looking is quick and needs nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import command, environment, wait_until, zeroray

import cluster.graph
from cluster import cli, driver, exported
from cluster.run_folder import RunFolder
from cluster.session import ClusterDown
from cluster.status import status_of
from conf.refusal import BadRequest
from conf.saved import to_yaml
from conf.schema import Run, RunInfo, Stage
from data_pipeline.store import NoValidCheckpoint, write_bytes, write_json

pytestmark = pytest.mark.unit

PREPARE = ["experiment=smoke", "run.name=mine", "stages=[prepare]"]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZERORAY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Put an outcome in the place of the stage graph: an exit code, or an exception."""

    def outcome(what: Any) -> None:
        def execute(run: Run, folder: RunFolder) -> int:
            if isinstance(what, BaseException):
                raise what
            return int(what)

        monkeypatch.setattr(cluster.graph, "execute", execute)

    return outcome


def folder() -> RunFolder:
    return RunFolder("runs", "mine")


ENDS = [
    (0, 0, "done", 0),
    (3, 3, "done", 0),
    (4, 4, "failed", 0),
    (6, 6, "stopped", 0),
    (BadRequest("a.b=1: no\ndo this\nand\nthat\nand more"), 2, "refused", 3),
    (ValueError("not the user's\nat all"), 1, "failed", 2),
    (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), 1, "failed", 2),
    (NoValidCheckpoint("history\nway out"), 5, "refused", 2),
    (ClusterDown("which\nwhat set it\nhow to start"), 1, "failed", 3),
    (KeyboardInterrupt(), 6, "stopped", 1),
    (RuntimeError("a bug"), 1, "failed", 2),
]


@pytest.mark.parametrize("ending", ENDS)
def test_every_end(
    graph: Callable[[Any], None], capsys: pytest.CaptureFixture[str], ending: tuple[Any, int, str, int]
) -> None:
    outcome, code, state, lines = ending
    graph(outcome)
    assert cli.main(["run", *PREPARE]) == code
    said = capsys.readouterr().err
    assert len(said.splitlines()) == lines
    assert "Traceback" not in said
    end = folder().events()[-1]
    assert (end["event"], end["state"], end["exit_code"]) == ("end", state, code)
    assert status_of(folder())["state"] == state
    assert folder().holder() is None


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_the_traceback_is_in_the_drivers_log(
    graph: Callable[[Any], None], capsys: pytest.CaptureFixture[str], kind: type[Exception]
) -> None:
    graph(kind("a bug"))
    cli.main(["run", *PREPARE])
    log = Path(folder().driver_log)
    assert str(log) in capsys.readouterr().err
    assert "Traceback" in log.read_text()
    assert f"{kind.__name__}: a bug" in log.read_text()


def test_a_run_that_is_active_is_not_started(graph: Callable[[Any], None], capsys: pytest.CaptureFixture[str]) -> None:
    graph(0)
    with folder().claimed():
        assert cli.main(["run", *PREPARE]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 3
    assert f"process {os.getpid()}" in said
    assert folder().events() == []


def test_a_changed_run_is_refused_whole_table(graph: Callable[[Any], None], capsys: pytest.CaptureFixture[str]) -> None:
    graph(0)
    assert cli.main(["run", *PREPARE]) == 0
    folder().ledger.append("stage", stage="documents", state="done")
    assert cli.main(["run", *PREPARE, "data.row_tokens=64", "tokenizer.vocab_size=600", "run.seed=3"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 6
    assert cli.main(["run", *PREPARE, "paths.store=elsewhere", "cluster.workers=1"]) == 0


REFUSED = [
    (["rnu"], "did you mean 'run'"),
    (["run", "train.stepz=1"], "train.steps"),
    (["run", "+train.stepz=1"], "train.steps"),
    (["run", *PREPARE, "plugins=[nobody_has_this]"], "nobody_has_this"),
    (["run", *PREPARE, "plugins=[../mine]"], "plugins=[mine]"),
    (["run", *PREPARE, "data.filters.min_char.limit=1"], "did you mean 'min_chars'"),
    (["run", *PREPARE, "data.filters.min_chars.limits=1"], "takes (text: str, limit: int)"),
    (["run", *PREPARE, "data.filters.min_chars.limit=few"], "data.filters.min_chars.limit=few: must be a whole number"),
    (["run", *PREPARE, "data.filters.min_chars.limit=true"], "data.filters.min_chars.limit=200"),
    (["run", *PREPARE, "corpus.reader=txt"], "did you mean 'text'"),
    (["run", "experiment=smoke", "cluster.ranks=5000"], "needs 5000 CPUs"),
    (["run", *PREPARE, "paths.store=''"], "must name a folder"),
    (["run", *PREPARE, "zero.extra.overlap_comm=5"], "must be true or false"),
    (["run", "experiment=smoke", "optim.options.amsgrd=true"], "did you mean 'amsgrad'"),
    (["run", "experiment=smoke", "model.name=decodr"], "did you mean 'decoder'"),
    (["run", "experiment=smoke", "schedule.name=cosin"], "did you mean 'cosine'"),
    (["status"], "which run?"),
    (["status", "mine"], "no such run"),
    (["status", "mine", "path.runs=x"], "paths.runs"),
    (["status", "mine", "experiment=smok"], "did you mean 'smoke'"),
    (["status", "--jsn", "mine"], "--json"),
    (["status", "mine", "other"], "only one run"),
    (["status", "../etc"], "one folder name"),
    (["list", "paths.rums=x"], "paths.runs"),
    (["logs", "mine"], "no such run"),
    (["stop", "mine"], "no such run"),
    (["generate", "mine", "hello"], "no such run"),
    (["eval", "./nothing"], "config.json"),
    (["doctor", "path.runs=x"], "paths.runs"),
    (["submit", "--multirun", "train.steps=1,2"], "one run"),
]


@pytest.mark.parametrize(("words", "expected"), REFUSED)
def test_bad_requests(words: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert expected in said.err
    assert len(said.err.splitlines()) <= 3
    assert "Traceback" not in said.err
    assert not said.out
    assert list(tmp_path.iterdir()) == [], "something was left behind"


def test_an_error_of_a_plugin_is_no_bad_request(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "broken_plugin.py").write_text('raise ValueError("oh")\n')
    assert cli.main(["run", *PREPARE, "plugins=[broken_plugin]"]) == 1
    said = capsys.readouterr().err
    assert "broken_plugin.py" in said
    assert "ValueError: oh" in said
    assert not (tmp_path / "runs").exists()


def test_a_mistyped_plugin(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "my_filters.py").touch()
    assert cli.main(["run", *PREPARE, "plugins=[my_filter]"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "did you mean 'my_filters'?" in said[0]
    assert "the folder that holds my_filter.py" in said[1]


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_has_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main([name, "--help"])
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr().out
    assert code == 0
    assert f"zeroray {name}" in said.partition("examples")[2]


def test_training_where_only_the_data_part_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "installed", lambda name: name != "torch")
    driver.check_packages(Run(stages=[Stage.prepare]))
    with pytest.raises(ValueError, match=r"torch is not installed\n.*stages=\[prepare\]"):
        driver.check_packages(Run())


LOOKING = [
    ["--help"],
    ["--version"],
    ["list", "--json"],
    ["status", "mine"],
    ["logs", "mine"],
    ["stop", "mine"],
    ["logs", "-h"],
]


def test_looking_imports_nothing_heavy(graph: Callable[[Any], None], tmp_path: Path) -> None:
    graph(0)
    cli.main(["run", *PREPARE])
    code = (
        "import sys, json\nfrom cluster.cli import main\n"
        f"for words in json.loads({json.dumps(json.dumps(LOOKING))}):\n"
        "    try: assert main(words) == 0, words\n    except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'hydra', 'omegaconf', 'numpy', 'pyarrow', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    process = subprocess.Popen(command("--help"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(20) == 0
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


def test_a_conf_folder_here_that_hides_ours(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").touch()
    done = zeroray(tmp_path, "list")
    assert done.returncode == 2
    assert f"{tmp_path}/trainer" in done.stderr
    assert "Traceback" not in done.stderr


SPEAKING = """
import sys
from cluster.logs import teed
from cluster.run_folder import RunFolder
from cluster.status import status_of
with teed(RunFolder("runs", "mine")):
    for _ in range(3):
        print("out", flush=True)
        print("err", file=sys.stderr, flush=True)
sys.exit(3)
"""


def test_the_console_may_go_away(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    args = [sys.executable, "-c", SPEAKING]
    done = subprocess.run(args, cwd=tmp_path, stdout=writing, stderr=writing, timeout=20, check=False)
    os.close(writing)
    assert done.returncode == 3
    assert Path(folder().driver_log).read_text() == "out\nerr\n" * 3


# --- a driver that is at work -------------------------------------------------------------------------------------

DRIVER = """
import os, sys, time
from cluster.logs import teed
from cluster.run_folder import RunFolder
from cluster.status import status_of
folder = RunFolder("runs", "mine")
with folder.claimed():
    folder.ledger.append("start", pid=os.getpid(), host="here")
    with teed(folder):
        print("begun", flush=True)
        while not os.path.exists(folder.stop_path):
            time.sleep(0.02)
        print("last words", flush=True)
    folder.ledger.append("end", state="stopped", exit_code=6, reason="as asked")
"""


@pytest.fixture
def at_work(tmp_path: Path) -> Any:
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER], cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL
    )
    log = Path(folder().driver_log)
    wait_until(lambda: log.exists() and log.read_text() == "begun\n", process, 20)
    yield process
    process.kill()
    process.wait()


def test_follow_to_the_end_and_stop(at_work: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]) -> None:
    write_bytes(f"{folder().logs}/rank-1.log", b"rank one\n")
    following = subprocess.Popen(command("logs", "-f", "mine"), env=environment(), stdout=subprocess.PIPE, text=True)
    assert following.stdout is not None
    assert "driver.log" in following.stdout.readline()
    threading.Thread(target=at_work.wait, daemon=True).start()
    assert cli.main(["stop", "mine", "--wait", "20"]) == 0
    assert "stopped" in capsys.readouterr().out
    assert following.wait(20) == 0
    said = following.stdout.read()
    assert said.startswith("begun\n")
    assert "rank one\n" in said
    assert said.endswith("last words\n")
    assert not os.path.exists(folder().stop_path)
    assert cli.main(["stop", "mine"]) == 0
    assert "not active" in capsys.readouterr().out


def test_stop_does_not_wait_for_ever(at_work: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]) -> None:
    os.kill(at_work.pid, signal.SIGSTOP)
    began = time.monotonic()
    assert cli.main(["stop", "mine", "--wait", "0.5"]) == 1
    assert time.monotonic() - began < 5
    assert "still at work" in capsys.readouterr().out
    os.kill(at_work.pid, signal.SIGCONT)


def test_logs_of_one_rank_and_last_lines(capsys: pytest.CaptureFixture[str]) -> None:
    folder().ledger  # noqa: B018 (only to name it)
    os.makedirs(folder().logs)
    folder().ledger.append("start")
    for rank in (1, 11):
        write_bytes(f"{folder().logs}/rank-{rank}.log", f"of {rank}\n".encode() * 3)
    write_bytes(folder().driver_log, "".join(f"line {i}\n" for i in range(100_000)).encode())
    assert cli.main(["logs", "mine", "--rank", "1", "-n", "2"]) == 0
    assert capsys.readouterr().out == "of 1\nof 1\n"
    assert cli.main(["logs", "mine", "-n", "1"]) == 0
    assert "==\nline 99999\n" in capsys.readouterr().out.replace(" <==", " ==")
    assert cli.main(["logs", "mine", "--rank", "7"]) == 2


def test_list_and_json(graph: Callable[[Any], None], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    graph(0)
    cli.main(["run", *PREPARE])
    (tmp_path / "runs" / "not_a_run").mkdir()
    write_json(f"{tmp_path}/home/runs/job/submission.json", {"id": "zeroray-job-1", "address": "a", "time": 1})
    capsys.readouterr()
    assert cli.main(["list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {name: row["state"] for name, row in rows.items()} == {"mine": "done", "job": "queued"}
    assert cli.main(["list", f"paths.runs={tmp_path}/runs"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["NAME", "mine"]
    assert cli.main(["status", "experiment=smoke", "run.name=mine"]) == 0


# --- using the export ---------------------------------------------------------------------------------------------


@pytest.fixture
def a_finished_run(tmp_path: Path) -> str:
    run = Run(run=RunInfo(name="mine"))
    run.paths.store = str(tmp_path / "store")
    write_bytes(folder().yaml_path, to_yaml(run).encode())
    write_json(f"{folder().path}/export/config.json", {"max_position_embeddings": 77})
    folder().ledger.append("stage", stage="tokens", state="done", key="k")
    write_json(f"{tmp_path}/store/tokens/k/manifest.json", {})
    return f"{folder().path}/export"


def test_generate(a_finished_run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import trainer.generate

    calls: list[Any] = []
    monkeypatch.setattr(trainer.generate, "generate", lambda *args: calls.append(args) or [f"+{p}" for p in args[1]])
    assert cli.main(["generate", "mine", "a = 1", "b", "--tokens", "5", "--temperature", "0", "--seed", "9"]) == 0
    assert calls == [(a_finished_run, ["a = 1", "b"], 5, 0.0, 9)]
    assert capsys.readouterr().out == "a = 1+a = 1\n\nb+b\n"
    assert cli.main(["generate", a_finished_run, "x", "paths.runs=runs"]) == 0
    assert calls[1][:2] == (a_finished_run, ["x"])


def test_eval(
    a_finished_run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import trainer.evaluate

    calls: list[Any] = []
    figures = {"heldout": {"loss": 1.5, "ppl": 4.4817, "bpb": 0.9}, "heldout_unigram": {"bpb": 2.0}}
    monkeypatch.setattr(trainer.evaluate, "evaluate_export", lambda *args: calls.append(args) or figures)
    assert cli.main(["eval", "mine", "--json", "--text", "t.txt", "--rows", "8"]) == 0
    assert json.loads(capsys.readouterr().out) == figures
    assert cli.main(["eval", a_finished_run]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[2:] == [["heldout", "1.5000", "4.4817", "0.9000"], ["heldout", "unigram", "-", "-", "2.0000"]]
    tokens = f"{tmp_path}/store/tokens/k"
    assert calls == [(a_finished_run, tokens, ["t.txt"], 256, 8), (a_finished_run, tokens, [], 256, None)]


def test_an_export_that_lies_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(f"{tmp_path}/model/config.json", {"max_position_embeddings": 77})
    assert exported.exported("model", [], "eval").row_tokens == 77
    assert cli.main(["eval", "model"]) == 2
    assert "--text" in capsys.readouterr().err
