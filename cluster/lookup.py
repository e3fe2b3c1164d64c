"""Which run a person means: a name and the same `key=value` overrides that `run` takes, read without Hydra.

    find(["quickstart", "paths.runs=/data/runs"]) -> RunFolder     status, logs, stop, generate, eval
    folders(["paths.runs=/data/runs"]) -> list[RunFolder]          list

Every override is checked for its name, so that a mistyped `path.runs=` is not ignored; only `paths.*`, `run.name` and
`experiment` matter here. Without `paths.runs` the place where Ray jobs put their runs is searched too.
"""

import os
from dataclasses import dataclass, field

import yaml

from cluster.run_folder import RunFolder, places
from conf.keys import CONF_FOLDER, names, refuse_unknown
from conf.refusal import BadRequest, refuse
from conf.registry import nearest
from conf.schema import Paths, RunInfo


@dataclass
class Words:
    """What the words of a command line say: a name, and overrides by key."""

    name: str | None = None
    overrides: dict[str, str] = field(default_factory=dict)

    @property
    def paths_runs(self) -> str:
        """The folder of runs."""
        return self.overrides.get("paths.runs", Paths().runs)

    def searched(self) -> tuple[str, ...]:
        """The folders in which to look."""
        return places(self.paths_runs, given="paths.runs" in self.overrides)


def read(words: list[str]) -> Words:
    """Sort words into a name and overrides; raises ValueError for an unknown key or option, and for a second name."""
    found, known = Words(), names()
    for word in words:
        key, equals, value = word.lstrip("+").partition("=")
        if not equals:
            if found.name is not None:
                raise BadRequest(f"{word}: only one run at a time, and {found.name} is named already")
            found.name = RunInfo(name=word).name
            continue
        kind = known.kind(key)
        if kind == "unknown":
            raise refuse_unknown(key, value, known)
        value = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
        if kind == "group" and value not in known.groups[key]:
            options = known.groups[key]
            raise refuse(key, value, f"no such option{nearest(value, options)}", f"options: {', '.join(options)}")
        found.overrides[key] = value
    found.name = found.name or found.overrides.get("run.name") or experiment_name(found.overrides.get("experiment"))
    return found


def experiment_name(experiment: str | None) -> str | None:
    """The run's name that an experiment gives, if it gives one."""
    if experiment is None:
        return None
    with open(f"{CONF_FOLDER}/experiment/{experiment}.yaml", encoding="utf-8") as file:
        name = (yaml.safe_load(file).get("run") or {}).get("name")
    return str(name) if name else None


def find(words: list[str], command: str) -> RunFolder:
    """The run that the words name; raises ValueError, with the names there are, when there is no such run."""
    said = read(words)
    if said.name is None:
        raise BadRequest(f"{command}: which run?\n{known_runs(said)}")
    found = [f for place in said.searched() if (f := RunFolder(place, said.name)).exists() or f.submission()]
    if not found:
        raise BadRequest(
            f"run.name={said.name}: no such run in {' or '.join(said.searched())}"
            f"{nearest(said.name, run_names(said))}\n{known_runs(said)}"
        )
    return found[0]


def folders(words: list[str]) -> list[RunFolder]:
    """Every run in the folders that the words name."""
    said = read(words)
    return [folder for place in said.searched() for folder in runs_in(place)]


def runs_in(place: str) -> list[RunFolder]:
    """The runs of one folder, by name; what is no run is left out."""
    if not os.path.isdir(place):
        return []
    found = [RunFolder(place, name) for name in sorted(os.listdir(place)) if os.path.isdir(f"{place}/{name}")]
    return [folder for folder in found if folder.exists() or folder.submission()]


def run_names(said: Words) -> list[str]:
    """The names of all runs that can be found."""
    return [folder.name for place in said.searched() for folder in runs_in(place)]


def known_runs(said: Words) -> str:
    """A line with the runs there are, or how to name another place."""
    found = run_names(said)
    more = f" and {len(found) - 10} more" if len(found) > 10 else ""
    if found:
        return f"runs here: {', '.join(found[:10])}{more}; elsewhere: paths.runs=FOLDER"
    return f"there are no runs in {' or '.join(said.searched())}; look elsewhere with paths.runs=FOLDER"
