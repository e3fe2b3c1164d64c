"""Tab completion for bash: `eval "$(zeroray -sc install=bash)"`, then `zeroray run mod<TAB>`.

    shell(["install=bash"], commands, out)     print the shell function that is evaluated once
    shell(["query=bash"], commands, out)       print what may follow COMP_LINE, one candidate a line
    candidates(line, commands) -> list[str]    the same as a list

Hydra's own completion takes the command line without the program's first word for overrides, so a subcommand such as
`run` breaks it, and it loads Hydra for a second at every key. Names come from conf/keys.py instead.
"""

import itertools
import os
from typing import TextIO

from conf.keys import Names, choices, defaults, is_dict, names
from conf.refusal import refuse
from conf.registry import nearest

FLAGS = ["--cfg", "--config-dir", "--help", "--multirun", "--package", "--resolve"]
TAKES_OVERRIDES = ("run", "submit")
IS_PATH = ("corpus.path", "tokenizer.path", "paths.runs", "paths.store")
BASH = r"""_zeroray_complete() {
    local line="${COMP_LINE:0:COMP_POINT}" IFS=$'\n'
    local word="${line##* }"
    COMPREPLY=($(COMP_LINE="$line" "$1" -sc query=bash 2>/dev/null))
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[=./] ]]; then compopt -o nospace; fi
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then COMPREPLY=("${COMPREPLY[@]#"${word%%=*}="}"); fi
}
complete -F _zeroray_complete zeroray
"""


def shell(arguments: list[str], commands: list[str], out: TextIO) -> int:
    """Answer what follows `zeroray -sc`: `install=bash`, `uninstall=bash` or `query=bash`; returns the exit code."""
    answers = {"install=bash": BASH, "uninstall=bash": "complete -r zeroray; unset -f _zeroray_complete\n"}
    chosen = arguments[0] if arguments else ""
    if chosen == "query=bash":
        out.writelines(f"{name}\n" for name in candidates(os.environ.get("COMP_LINE", ""), commands))
    elif chosen in answers:
        out.write(answers[chosen])
    else:
        known = [*answers, "query=bash"]
        raise refuse(
            "-sc", chosen, f"no such answer{nearest(chosen, known)}", 'bash only: eval "$(zeroray -sc install=bash)"'
        )
    return 0


def candidates(line: str, commands: list[str]) -> list[str]:
    """What the last word of a command line may become, sorted; the first word is the program."""
    words = line.split()
    word = "" if not words or line[-1].isspace() else words.pop()
    if len(words) <= 1:
        return sorted(name for name in commands if name.startswith(word))
    if word.startswith("-"):
        return [flag for flag in FLAGS if flag.startswith(word)] if words[1] in TAKES_OVERRIDES else []
    if words[1] in TAKES_OVERRIDES:
        return _overrides(word, names(_config_dir(words)))
    return _runs(word, words)


def _overrides(word: str, known: Names) -> list[str]:
    """Groups, keys up to their next dot, or the values of a key; a `+` or `~` in front stays there."""
    sign = word[: len(word) - len(word.lstrip("+~"))]
    typed = word[len(sign) :]
    if "=" in typed:
        key, _, value = typed.partition("=")
        return [f"{sign}{key}={found}" for found in _values(key, value, known)]
    whole = [f"{name}." if is_dict(kind) else f"{name}=" for name, kind in known.types.items()]
    matching = [name for name in [*(f"{group}=" for group in known.groups), *whole] if name.startswith(typed)]
    return sorted({sign + name[: len(typed)] + _to_dot(name[len(typed) :]) for name in matching})


def _to_dot(rest: str) -> str:
    """The rest of a name up to and with its next dot."""
    head, dot, _ = rest.partition(".")
    return head + dot


def _values(key: str, value: str, known: Names) -> list[str]:
    """What may be typed after `key=`: options, members, files, or the default."""
    if key in known.groups:
        return [option for option in known.groups[key] if option.startswith(value)]
    if key in IS_PATH or value.startswith(("/", ".")):
        return _files(value)
    few = choices(known.types.get(key))
    if few or value:
        return [name for name in few if name.startswith(value)]
    usual = defaults().get(key)
    return [str(usual)] if isinstance(usual, int | float | str) else []


def _files(start: str) -> list[str]:
    """Files and folders whose path begins like `start`; folders end in a slash."""
    folder, name = os.path.split(start)
    if not os.path.isdir(folder or "."):
        return []
    found = [os.path.join(folder, entry) for entry in sorted(os.listdir(folder or ".")) if entry.startswith(name)]
    return [f"{path}/" if os.path.isdir(path) else path for path in found]


def _runs(word: str, words: list[str]) -> list[str]:
    """The names of runs in the runs folder, for the commands that take one, and `paths.runs=`."""
    runs = next((text.partition("=")[2] for text in words if text.startswith("paths.runs=")), "runs")
    if word.startswith("paths.runs="):
        return [f"paths.runs={path}" for path in _files(word.partition("=")[2])]
    found = sorted(os.listdir(runs)) if os.path.isdir(runs) else []
    return [name for name in [*found, "paths.runs="] if name.startswith(word)]


def _config_dir(words: list[str]) -> str | None:
    """The folder after `--config-dir`, when there is one."""
    after = [b for a, b in itertools.pairwise(words) if a in ("--config-dir", "-cd")]
    return after[-1] if after and os.path.isdir(after[-1]) else None
