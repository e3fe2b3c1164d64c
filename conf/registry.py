"""Things found by name: ours, a working folder's plugins, and other packages' entry points.

A `Registry` maps a name such as `adamw` to the object that implements it. Names come from three places, looked up in
this order: what zeroray itself registers, what the modules named in `plugins=[...]` register when they are imported,
and entry points of installed packages (group `zeroray.models`, `zeroray.filters`, ...). A name in a data file or a
checkpoint is only ever looked up here; it is never imported as a dotted path.

    from conf.registry import FILTERS

    @FILTERS.register("no_tabs")
    def no_tabs(text: str) -> str | None: ...
"""

import difflib
import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from conf.refusal import BadRequest

T = TypeVar("T")


def nearest(name: str, known: list[str]) -> str:
    """Return ` (did you mean 'x'?)` for the closest of `known`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


class Registry:
    """One kind of named thing; `key` is the config key that selects it, used in error messages."""

    def __init__(self, group: str, key: str) -> None:
        self.group = group
        self.key = key
        self._ours: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its object under `name`; a second owner of a name is an error."""

        def keep(thing: T) -> T:
            owner = self._ours.get(name)
            if owner is not None and getattr(owner, "__module__", None) != getattr(thing, "__module__", None):
                raise ValueError(f"{self.group}: {name!r} is registered twice, by {owner!r} and {thing!r}")
            self._ours[name] = thing
            return thing

        return keep

    def names(self) -> list[str]:
        """Every name that `get` would find, sorted."""
        return sorted({*self._ours, *(e.name for e in importlib.metadata.entry_points(group=self.group))})

    def get(self, name: str) -> Any:
        """Return what is registered under `name`; raises ValueError with the nearest valid name otherwise."""
        if name in self._ours:
            return self._ours[name]
        found = list(importlib.metadata.entry_points(group=self.group, name=name))
        if found:
            return found[0].load()
        known = self.names()
        raise BadRequest(
            f"{self.key}={name}: no such name{nearest(name, known)}\n"
            f"known: {', '.join(known)}; others come from plugins=[module] or an installed package's "
            f"{self.group!r} entry points"
        )


MODELS = Registry("zeroray.models", "model.name")
OBJECTIVES = Registry("zeroray.objectives", "objective.name")
OPTIMIZERS = Registry("zeroray.optimizers", "optim.name")
SCHEDULES = Registry("zeroray.schedules", "schedule.name")
FILTERS = Registry("zeroray.filters", "data.filters")
READERS = Registry("zeroray.readers", "corpus.reader")


def load_plugins(modules: list[str], folder: str) -> None:
    """Import the plugin `modules`, found in the working `folder` or installed, so that they register their names.

    Raises ValueError when a module name is not a plain identifier path or the module does not exist.
    """
    for name in modules:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
            plain = name.rpartition("/")[2].removesuffix(".py")
            sample = plain if re.fullmatch(r"[A-Za-z_]\w*", plain) else "my_filters"
            raise BadRequest(
                f"plugins=[{name}]: not a module name\n"
                f"name the module without .py and slashes, from the folder that holds it: plugins=[{sample}]"
            )
        if folder not in sys.path:
            sys.path.insert(0, folder)
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            here = sorted(file.removesuffix(".py") for file in os.listdir(folder) if file.endswith(".py"))
            raise BadRequest(
                f"plugins=[{name}]: no module {name!r} in {folder} or among the installed packages"
                f"{nearest(name, here)}\n"
                f"start from the folder that holds {name}.py, or install the package that does"
            ) from error
