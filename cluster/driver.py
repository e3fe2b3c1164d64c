"""`zeroray run`: the driver, one process that holds a run's lease and takes it to its end.

    run_command(words)      Hydra overrides -> one Run, or several with --multirun (conf.app)
    drive(run)              this run, every way it can end told as an exit code, in the ledger and in driver.log
        check packages, names, data, ranks -> claim the folder -> admit -> ledger `start` -> cluster.graph.execute
        -> ledger `end`

Whatever goes wrong after the run began leaves an `end` in the ledger; a driver that is killed leaves none, which is how
`status` knows that it is dead. What the user can mend (BadRequest) is told in a few lines; of any other error, of ours
or of a plugin, the traceback goes to driver.log and the console gets what happened and where to look.
"""

import importlib
import inspect
import logging
import os
import shlex
import signal
import socket
import sys
import traceback
from types import FrameType

from cluster.console import told
from cluster.logs import teed
from cluster.names import check_owners, installed
from cluster.policy import DISK_ERRNOS, EXIT_BAD_REQUEST, EXIT_FAILED, EXIT_HISTORY, EXIT_STOPPED, first_line
from cluster.run_folder import RunFolder, settle_paths
from cluster.session import ClusterDown, inside_job
from conf.keys import describe
from conf.refusal import BadRequest, refuse
from conf.registry import FILTERS, MODELS, OBJECTIVES, OPTIMIZERS, READERS, SCHEDULES, load_plugins
from conf.schema import Run, Stage
from data_pipeline.store import NoValidCheckpoint, write_bytes

log = logging.getLogger("zeroray")

END_STATES = {0: "done", 3: "done", EXIT_STOPPED: "stopped", EXIT_HISTORY: "refused", EXIT_BAD_REQUEST: "refused"}
PARAMETER_TYPES = {int: "200", float: "0.5", str: "text", bool: "true"}  # of a filter, with an example
PROGRESS = ("resumed", "checkpoint", "eval")
TRAIN_PACKAGES = ("torch", "deepspeed", "transformers", "safetensors")


def run_command(words: list[str]) -> int:
    """Everything after `zeroray run`."""
    from conf.app import run_app

    return run_app(words, drive)


def drive(run: Run) -> int:
    """Take one run to its end; returns the exit code. Raises only what a plugin raises when it is imported."""
    signal.signal(signal.SIGTERM, interrupt)
    folder = None
    try:
        settle_paths(run, inside_job())
        folder = RunFolder(run.paths.runs, run.run.name)
        check_owners()
        check_packages(run)
        check_registered(run)
        check_data(run)
        check_ranks(run)
        with folder.claimed():
            return admitted(run, folder)
    except BadRequest as error:
        return told(error)
    except NoValidCheckpoint as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_HISTORY
    except OSError as error:
        if error.errno in DISK_ERRNOS:
            sys.stderr.write(f"{run.paths.runs}: {error.strerror}\nmake room; the same command continues\n")
            return EXIT_STOPPED
        sys.stderr.write(
            f"{folder.path if folder else run.paths.runs}: {error}\nuse another folder: paths.runs=FOLDER\n"
        )
        return EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write("interrupted before anything was started\n")
        return EXIT_STOPPED


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    """SIGTERM before the stage graph takes over is a Ctrl-C."""
    raise KeyboardInterrupt


def check_packages(run: Run) -> None:
    """Refuse training where only the data part is installed."""
    if set(run.stages) == {Stage.prepare}:
        return
    missing = [name for name in TRAIN_PACKAGES if not installed(name)]
    if missing:
        names = ",".join(stage.name for stage in run.stages)
        way_out = "prepare data alone: stages=[prepare]; or install them: pip install 'zeroray[train]' (torch first)"
        raise refuse("stages", f"[{names}]", f"{', '.join(missing)} is not installed", way_out)


def check_registered(run: Run) -> None:
    """Refuse names that nobody registered, before anything is started.

    The names of the supported recipe are not looked up: that would import torch, 3 s at every start.
    """
    load_plugins(run.plugins, os.getcwd())
    if set(run.stages) == {Stage.prepare}:
        return
    ours = Run()
    for part, registry, room in (
        ("model", MODELS, "trainer.models"),
        ("objective", OBJECTIVES, "trainer.objectives"),
        ("optim", OPTIMIZERS, "trainer.optim"),
        ("schedule", SCHEDULES, "trainer.schedules"),
    ):
        name = getattr(run, part).name
        if name != getattr(ours, part).name:
            importlib.import_module(room)
            registry.get(name)


def check_data(run: Run) -> None:
    """Refuse a reader, filters and their parameters that cannot be."""
    from data_pipeline import readers  # noqa: F401 (it registers ours)
    from data_pipeline.corpus import entries_of
    from data_pipeline.filters import build_filters

    READERS.get(run.corpus.reader)
    if Stage.prepare in run.stages:
        entries_of(run.corpus)
    build_filters(run.data.filters)
    for name, given in run.data.filters.items():
        parameters = inspect.signature(FILTERS.get(name)).parameters
        for parameter, value in (given or {}).items():
            kind = parameters[parameter].annotation if parameter in parameters else None
            if kind in PARAMETER_TYPES and not has_type(value, kind):
                key = f"data.filters.{name}.{parameter}"
                raise refuse(key, value, f"must be {describe(kind)}", f"for example {key}={PARAMETER_TYPES[kind]}")


def has_type(value: object, kind: type) -> bool:
    """Whether a value is of a plain type; true is no number, and a whole number may stand for any number."""
    if kind is not bool and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def check_ranks(run: Run) -> None:
    """Refuse more ranks than this machine can hold, where the Ray will be a private one."""
    from cluster.graph import check_ranks_early

    check_ranks_early(run)


def admitted(run: Run, folder: RunFolder) -> int:
    """Admit the run to its folder and execute it there, with an `end` in the ledger whatever happens."""
    before = read_or_none(folder.yaml_path)
    how = folder.admit(run)
    begun = len(folder.events())
    command = shlex.join(["zeroray", *sys.argv[1:]])
    folder.ledger.append(
        "start", pid=os.getpid(), host=socket.gethostname(), command=command, job=os.environ.get("RAY_JOB_ID"), how=how
    )
    with teed(folder):
        show_log()
        code, reason = executed(run, folder)
    since = folder.events()[begun:]
    if not any(event["event"] == "end" for event in since):
        folder.ledger.append("end", state=END_STATES.get(code, "failed"), exit_code=code, reason=reason)
    if code in (EXIT_FAILED, EXIT_BAD_REQUEST) and before and not any(e["event"] in PROGRESS for e in since):
        write_bytes(folder.yaml_path, before)  # a request that came to nothing does not change what the run is
    return code


def read_or_none(path: str) -> bytes | None:
    """A file's bytes; None when there is none."""
    if not os.path.exists(path):
        return None
    with open(path, "rb") as file:
        return file.read()


def executed(run: Run, folder: RunFolder) -> tuple[int, str]:
    """Execute the stage graph; returns the exit code and, where it is not plain, the reason."""
    from cluster.graph import execute

    try:
        code: int = execute(run, folder)
        return code, ""
    except BadRequest as error:
        return told(error), first_line(error)
    except NoValidCheckpoint as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_HISTORY, first_line(error)
    except ClusterDown as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED, first_line(error)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command continues\n")
        return EXIT_STOPPED, "interrupted"
    except Exception as error:
        with open(folder.driver_log, "a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        sys.stderr.write(f"{type(error).__name__}: {first_line(error)}\nthe whole story: {folder.driver_log}\n")
        return EXIT_FAILED, f"{type(error).__name__}: {first_line(error)}"


def show_log() -> None:
    """Send the program's own log to the console and so to driver.log; other libraries' from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
