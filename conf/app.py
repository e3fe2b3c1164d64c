"""`zeroray run` as a person types it: flags, help, `--cfg job`, and one run or several.

    run_app(argv, task, prog) -> int      everything after `zeroray run`; calls `task(run)` for each run
    planned(flags) -> list[Run]           every run composed and checked before any is started
    job_names(...)                        in --multirun each run has its own name, the same at the next start
    help_text(prog, names)                the short help: flags, groups with their options, keys, examples

A request that cannot be run raises ValueError before `task` is called. In --multirun the runs go one after another;
the worst exit code is returned, and a run that was asked to stop (exit 6) is the last.
"""

import argparse
import dataclasses
import functools
import hashlib
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import yaml

from conf.compose import compose, composed
from conf.identity import plain
from conf.keys import CONF_FOLDER, Names, names
from conf.overrides import jobs, swept
from conf.refusal import BadRequest, refuse
from conf.registry import nearest
from conf.saved import dump
from conf.schema import Run

STOPPED = 6
BY_SEVERITY = [0, 3, STOPPED, 5, 4, 2]  # any other exit code is worse
LONGEST_NAME = 120


def run_app(argv: list[str], task: Callable[[Run], int], prog: str = "zeroray run") -> int:
    """Do what `prog argv` asks for and return the exit code; raises ValueError for what cannot be run."""
    flags = _parse(argv, prog)
    if flags.help:
        sys.stdout.write(help_text(prog, names(flags.config_dir)))
        return 0
    runs = planned(flags)
    if flags.cfg:
        sys.stdout.write(_configs(flags, runs))
        return 0
    return one_after_another(runs, task) if flags.multirun else task(runs[0])


def _parse(argv: list[str], prog: str) -> argparse.Namespace:
    """The flags, with every other word in `overrides`."""
    parser = _Parser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--cfg", "-c", choices=["job"])
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--package", "-p")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--config-dir", "-cd")
    flags = parser.parse_intermixed_args(argv)
    if (flags.resolve or flags.package) and not flags.cfg:
        parser.error("--resolve and --package belong to --cfg job")
    return flags


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with the nearest flag where one was mistyped."""
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        known = [flag for action in self._actions for flag in action.option_strings]
        hint = nearest(unknown.group(1), known) if unknown else ""
        raise BadRequest(f"{self.prog}: {message}{hint}\nflags, groups and examples: {self.prog} --help")


def planned(flags: argparse.Namespace) -> list[Run]:
    """Every run that was asked for, composed and named; raises ValueError when any of them cannot be."""
    if not flags.multirun:
        return [compose(flags.overrides, flags.config_dir)]
    known = names(flags.config_dir)
    every = jobs(flags.overrides, known)
    runs = [compose(job, flags.config_dir) for job in every]
    varied = swept(flags.overrides, known)
    changes = [[text for text, varies in zip(job, varied, strict=True) if varies] for job in every]
    return [_renamed(run, name) for run, name in zip(runs, job_names(runs, changes), strict=True)]


def job_names(runs: list[Run], changes: list[list[str]]) -> list[str]:
    """A name for each run: its own where these differ, otherwise with what was varied, never with its number.

    >>> job_names([Run(), Run()], [["train.steps=1"], ["train.steps=2"]])
    ['default-train.steps_1', 'default-train.steps_2']
    """
    own = [run.run.name for run in runs]
    if len(set(own)) == len(own):
        return own
    parts = [re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(text.lstrip("+") for text in job)).strip("_") for job in changes]
    long = [f"{name}-{part}" for name, part in zip(own, parts, strict=True)]
    if len(set(long)) == len(long) and max(map(len, long)) <= LONGEST_NAME:
        return long
    marks = [hashlib.sha256("\n".join(job).encode()).hexdigest()[:8] for job in changes]
    return [f"{name[: LONGEST_NAME - 9]}-{mark}" for name, mark in zip(long, marks, strict=True)]


def _renamed(run: Run, name: str) -> Run:
    """The run under another name."""
    return dataclasses.replace(run, run=dataclasses.replace(run.run, name=name))


def one_after_another(runs: list[Run], task: Callable[[Run], int]) -> int:
    """Do the runs in turn, say how each ended, and return the worst exit code."""
    codes: list[int] = []
    for number, run in enumerate(runs, start=1):
        sys.stderr.write(f"run {number} of {len(runs)}: {run.run.name}\n")
        codes.append(_exit_code(run, task))
        if codes[-1] == STOPPED:
            break
    for run, code in zip(runs, codes, strict=False):
        sys.stderr.write(f"{run.run.name}: exit {code}\n")
    for run in runs[len(codes) :]:
        sys.stderr.write(f"{run.run.name}: not started\n")
    return max(codes, key=lambda code: BY_SEVERITY.index(code) if code in BY_SEVERITY else len(BY_SEVERITY))


def _exit_code(run: Run, task: Callable[[Run], int]) -> int:
    """One of several runs: its failure is told and does not keep the others from starting."""
    try:
        return task(run)
    except BadRequest as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except Exception:
        traceback.print_exc()
        return 1


def _configs(flags: argparse.Namespace, runs: list[Run]) -> str:
    """What `--cfg job` prints: one document for each run."""
    if flags.multirun:
        return "".join(f"--- # {run.run.name}\n{dump(_part(plain(run), flags.package))}" for run in runs)
    return dump(_part(composed(flags.overrides, flags.config_dir, flags.resolve), flags.package))


def _part(tree: dict[str, Any], package: str | None) -> Any:
    """The tree, or the part of it that a dotted key names."""
    try:
        return functools.reduce(lambda node, name: node[name], package.split("."), tree) if package else tree
    except (KeyError, TypeError):
        raise refuse("--package", package, f"no such key{_nearest_part(str(package))}", "leave it out") from None


def _nearest_part(package: str) -> str:
    """` (did you mean ...?)` among groups of keys and keys."""
    known = names()
    return nearest(package, [*known.nodes, *known.types])


def help_text(prog: str, known: Names) -> str:
    """The short help."""
    with open(os.path.join(CONF_FOLDER, "run.yaml"), encoding="utf-8") as file:
        chosen = {k: v for item in yaml.safe_load(file)["defaults"] if isinstance(item, dict) for k, v in item.items()}
    return HELP.format(prog=prog, groups=_groups_help(known, chosen), keys=_keys_help(known))


def _groups_help(known: Names, chosen: dict[str, str]) -> str:
    """A line for each group; the option taken when nothing is said has a star."""
    lines = []
    for group, usual in chosen.items():
        options = [f"{name}*" if name == usual else name for name in known.groups[group]]
        lines.append(f"  {group:<11} {', '.join(options)}")
    return "\n".join(lines)


def _keys_help(known: Names) -> str:
    """A line for each node with the names of its keys."""
    below: dict[str, list[str]] = {}
    for key in known.types:
        node, dot, leaf = key.partition(".")
        below.setdefault(f"{node}.", []).append(leaf) if dot else below.setdefault("", []).append(key)
    return "\n".join(
        textwrap.fill(" ".join(leaves), 118, initial_indent=f"  {node:<11} ", subsequent_indent=" " * 14)
        for node, leaves in below.items()
    )


HELP = """{prog}: raw text to a trained, evaluated, exported model. The same command again continues where it stopped.

usage: {prog} [group=option | key=value ...] [flags]

flags
  --cfg job [--resolve]   print the whole run as YAML and start nothing (--package train: that part of it)
  --multirun, -m          one run after another for each value of key=1,2 or group=a,b; each has its own name
  --config-dir FOLDER     take options from your YAML too: FOLDER/experiment/mine.yaml is experiment=mine
  --help, -h              this text

groups and their options (* when nothing is said)
{groups}

keys (each with its value: {prog} --cfg job)
{keys}

examples
  {prog} experiment=quickstart
  {prog} experiment=quickstart train.steps=50 zero.stage=3
  {prog} run.name=mine corpus=jsonl corpus.path='/data/*.jsonl' model=small train.steps=5000
  {prog} run.name=mine stages=[prepare] data.filters.min_chars.limit=200
  {prog} --multirun experiment=quickstart optim.lr=1e-3,3e-3
quote a value that has , = : # {{ [ ( ~ or letters beyond ASCII: 'corpus.path="/data/a=b"'
"""
