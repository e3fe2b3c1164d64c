"""The command line: `zeroray COMMAND ...`, the same as `python -m cluster COMMAND ...`.

    main(argv) -> exit code      which command, with every error told in a few lines
    run, submit                  take Hydra overrides and hand them to conf.app
    status, list, logs, stop     read a run's folder; no Ray, torch or Hydra is imported for them
    generate, eval               use a run's exported model
    doctor                       looks at this machine

Exit codes: 0 done, 1 failed, 2 bad request, 3 done with quarantined documents, 4 too many of them, 5 refuses to start
over a history without a valid checkpoint, 6 stopped in order (the same command continues).
"""

import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from cluster.console import parser, print_json, told
from cluster.names import Shadowed, check_one_folder
from cluster.policy import EXIT_BAD_REQUEST, EXIT_FAILED, EXIT_STOPPED


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        check_one_folder()
    except Shadowed as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_BAD_REQUEST
    return carried_out(words)


def carried_out(words: list[str]) -> int:
    """The exit code of a command, every error told: the user's in a few lines, others with a traceback."""
    from conf.refusal import BadRequest

    try:
        code = command(words)
        sys.stdout.flush()
        return code
    except BadRequest as error:
        return told(error)
    except BrokenPipeError:  # whoever read our output has seen enough (`| head`)
        from cluster.logs import to_nowhere

        to_nowhere(sys.stdout)
        return 0
    except OSError as error:
        sys.stderr.write(f"zeroray: {error}\n")
        return EXIT_FAILED
    except Exception as error:
        traceback.print_exc()
        sys.stderr.write(f"zeroray: an error of the program or of a plugin: {type(error).__name__}\n")
        return EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return EXIT_STOPPED if words[:1] == ["run"] else 130


def command(words: list[str]) -> int:
    """Find the command and call it with the words after it."""
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0
    if words[0] in ("-V", "--version"):
        sys.stdout.write(f"zeroray {version()}\n")
        return 0
    if words[0] in ("-sc", "--shell-completion"):
        from conf.completion import shell

        return shell(words[1:], list(COMMANDS), sys.stdout)
    if words[0] not in COMMANDS:
        from conf.refusal import BadRequest
        from conf.registry import nearest

        raise BadRequest(f"zeroray {words[0]}: no such command{nearest(words[0], list(COMMANDS))}\nzeroray --help")
    return COMMANDS[words[0]](words[1:])


def version() -> str:
    """The installed version, or that of a source checkout."""
    import importlib.metadata

    try:
        return importlib.metadata.version("zeroray")
    except importlib.metadata.PackageNotFoundError:
        return "from source, not installed"


def status(words: list[str]) -> int:
    """How a run is."""
    examples = ["quickstart", "quickstart --json", "mine paths.runs=/data/runs"]
    made = parser("status", "How a run is, from its folder alone.", examples)
    made.add_argument("--json", action="store_true", help="everything, for a program to read")
    said = made.parse_intermixed_args(words)
    from cluster.lookup import find
    from cluster.status import status_of, status_text

    found = status_of(find(said.words, made.prog))
    if said.json:
        print_json(found)
    else:
        sys.stdout.write(status_text(found))
    return 0


def list_runs(words: list[str]) -> int:
    """All runs of a folder."""
    made = parser("list", "All runs, a line each.", ["", "--json", "paths.runs=/data/runs"], "override")
    made.add_argument("--json", action="store_true", help="for a program to read")
    said = made.parse_intermixed_args(words)
    from cluster.lookup import folders
    from cluster.status import list_row, list_text

    rows = [list_row(folder) for folder in folders(said.words)]
    if said.json:
        print_json(rows)
    else:
        sys.stdout.write(list_text(rows) if rows else "no runs here; start one: zeroray run experiment=quickstart\n")
    return 0


def logs(words: list[str]) -> int:
    """What a run said."""
    examples = ["quickstart", "-f quickstart", "quickstart --rank 1 --lines 500"]
    made = parser("logs", "What a run said: its driver and its ranks.", examples)
    made.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
    made.add_argument("--rank", type=int, help="the log of this rank alone")
    made.add_argument("-n", "--lines", type=int, default=100, help="how many last lines of each log (100)")
    said = made.parse_intermixed_args(words)
    from cluster.logs import show
    from cluster.lookup import find

    return show(find(said.words, made.prog), said.rank, max(0, said.lines), said.follow, sys.stdout)


def stop(words: list[str]) -> int:
    """Ask a run to stop."""
    what = "Ask a run to commit a checkpoint and end; the same command continues it later."
    made = parser("stop", what, ["quickstart", "quickstart --wait 300"])
    made.add_argument("--wait", type=float, default=60.0, metavar="SECONDS", help="how long to wait for its end (60)")
    said = made.parse_intermixed_args(words)
    from cluster.lookup import find
    from cluster.stop import stop as stop_run

    return stop_run(find(said.words, made.prog), said.wait, sys.stdout)


def run(words: list[str]) -> int:
    """Do a run."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # until the driver takes it
    from cluster.driver import run_command

    return run_command(words)


def submit(words: list[str]) -> int:
    """Do a run as a Ray job."""
    from cluster.submit import submit_command

    return submit_command(words)


def generate(words: list[str]) -> int:
    """Continue a text."""
    examples = ['quickstart "def read(path):"', 'runs/quickstart/export "import " --tokens 100 --temperature 0']
    made = parser("generate", "Continue a text with a run's exported model.", examples, "")
    made.add_argument("model", help="a run's name, or an exported folder")
    made.add_argument("words", nargs="+", metavar="prompt", help="texts to continue, and overrides: paths.runs=FOLDER")
    made.add_argument("--tokens", type=int, default=64, help="how many tokens to add (64)")
    made.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (0.8)")
    made.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (0)")
    from cluster.exported import generate_command

    return generate_command(made.parse_intermixed_args(words), sys.stdout)


def evaluate(words: list[str]) -> int:
    """Measure an exported model."""
    examples = ["quickstart", "quickstart --json", "runs/quickstart/export --text mine.txt other.txt"]
    made = parser("eval", "Held-out loss, perplexity and bits per byte of an exported model.", examples, "")
    made.add_argument("model", help="a run's name, or an exported folder")
    made.add_argument("words", nargs="*", metavar="override", help="overrides such as paths.runs=FOLDER")
    made.add_argument("--text", nargs="+", default=[], metavar="FILE", help="measure these text files too")
    made.add_argument("--rows", type=int, metavar="N", help="at most N held-out rows (all)")
    made.add_argument("--json", action="store_true", help="for a program to read")
    from cluster.exported import evaluate_command

    return evaluate_command(made.parse_intermixed_args(words), sys.stdout)


def doctor(words: list[str]) -> int:
    """Look at this machine."""
    made = parser("doctor", "Can this machine run zeroray? Each finding with what to do.", ["", "--json"], "override")
    made.add_argument("--json", action="store_true", help="for a program to read")
    said = made.parse_intermixed_args(words)
    from cluster.doctor import doctor_command

    return doctor_command(said.words, said.json, sys.stdout)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": run,
    "submit": submit,
    "status": status,
    "list": list_runs,
    "logs": logs,
    "stop": stop,
    "generate": generate,
    "eval": evaluate,
    "doctor": doctor,
}

HELP = """zeroray: raw text to a trained, evaluated, exported transformer, on this machine or on a Ray cluster.

usage: zeroray COMMAND ...            each with --help and examples; the same as python -m cluster COMMAND ...

  run        do a run; the same command again continues it
  submit     do a run as a job of a Ray cluster
  status     how a run is                         (--json)
  list       all runs                             (--json)
  logs       what a run said                      (-f follows it to its end)
  stop       commit a checkpoint and end
  generate   continue a text with a trained model
  eval       measure a trained model              (--json)
  doctor     can this machine run zeroray?        (--json)

examples
  zeroray run experiment=quickstart
  zeroray run experiment=quickstart run.name=mine model=small optim.lr=5e-4
  zeroray status quickstart
  zeroray logs -f quickstart
  zeroray generate quickstart "def read(path):"
  eval "$(zeroray -sc install=bash)"          tab completion

exit codes: 0 done, 1 failed, 2 bad request, 3 done with quarantined documents, 4 too many of them,
            5 history without a valid checkpoint, 6 stopped in order
"""
