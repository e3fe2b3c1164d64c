"""What every command shares: its parser, how an error is told, and JSON for a program to read."""

import argparse
import json
import re
import sys
from typing import Any, NoReturn

from cluster.policy import EXIT_BAD_REQUEST

ERROR_LINES = 3


def told(error: ValueError) -> int:
    """Tell a user's error: three lines at most, except for a table of differences."""
    from cluster.run_folder import OtherSettings

    lines = (str(error).strip() or type(error).__name__).splitlines()
    sys.stderr.write("\n".join(lines if isinstance(error, OtherSettings) else lines[:ERROR_LINES]) + "\n")
    return EXIT_BAD_REQUEST


class Parser(argparse.ArgumentParser):
    """A parser whose errors are a BadRequest with the nearest flag and the way to the help."""

    def error(self, message: str) -> NoReturn:
        """Raise BadRequest."""
        from conf.refusal import BadRequest
        from conf.registry import nearest

        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        flags = [flag for action in self._actions for flag in action.option_strings]
        hint = nearest(unknown.group(1), flags) if unknown else ""
        raise BadRequest(f"{self.prog}: {message}{hint}\nflags and examples: {self.prog} --help")


def parser(name: str, what: str, examples: list[str], run_words: str = "run") -> Parser:
    """The parser of one command; `run_words` names its positional words."""
    text = "examples:\n" + "\n".join(f"  zeroray {name} {example}".rstrip() for example in examples)
    made = Parser(
        prog=f"zeroray {name}",
        description=what,
        epilog=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if run_words:
        made.add_argument(
            "words", nargs="*", metavar=run_words, help="a run's name, and overrides such as paths.runs=FOLDER"
        )
    return made


def print_json(value: Any) -> None:
    """Print a JSON value for a program to read."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
