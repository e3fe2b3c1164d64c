"""The names a person may type: dotted keys with their types, groups with their options, and the nearest valid one.

    names(config_dir) -> Names          every key of `Run`, every group (a folder of YAML), of ours and of `config_dir`
    Names.kind("train.steps")           what a dotted name is: leaf, group, node, free (below a free-form dict), unknown
    refuse_unknown(key, value, names)   the error for the last of them, with the nearest valid name

Free-form dicts (`data.filters`, `zero.extra`, `*.options`) take any name below them. Hydra is not needed here, so tab
completion answers quickly.
"""

import dataclasses
import difflib
import enum
import functools
import os
import types
import typing
from dataclasses import dataclass
from typing import Any

from conf.identity import plain
from conf.refusal import BadRequest, refuse
from conf.registry import nearest
from conf.schema import Run

CONF_FOLDER = os.path.dirname(os.path.abspath(__file__))
EXAMPLES = {
    "corpus.path": "/data/*.jsonl",
    "corpus.id_key": "id",
    "tokenizer.path": "/data/tokenizer.json",
    "cluster.address": "auto",
}
EVERY_KEY = "every key and its value: zeroray run --cfg job"


@functools.cache
def leaf_types(cls: type = Run, prefix: str = "") -> dict[str, Any]:
    """The type of every dotted key of a dataclass tree."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            found |= leaf_types(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = kind
    return found


@functools.cache
def defaults() -> dict[str, Any]:
    """The default of every dotted key, as a plain value; free-form dicts are one key."""
    tree = plain(Run())
    return {key: functools.reduce(lambda node, name: node[name], key.split("."), tree) for key in leaf_types()}


@dataclass(frozen=True)
class Names:
    """Everything that may be typed before a `=`; `groups` maps each group to its sorted options."""

    types: dict[str, Any]
    nodes: frozenset[str]
    groups: dict[str, list[str]]

    def kind(self, key: str) -> str:
        """What `key` is: `group`, `leaf`, `node`, `free` (below a free-form dict) or `unknown`."""
        if key in self.groups:
            return "group"
        if key in self.types:
            return "leaf"
        if key in self.nodes:
            return "node"
        return "free" if self.free_form_of(key) else "unknown"

    def free_form_of(self, key: str) -> str:
        """The free-form dict that `key` is in or below, or an empty string."""
        parts = key.split(".")
        above = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
        return next((name for name in above if is_dict(self.types.get(name))), "")

    def nearest(self, key: str) -> str:
        """` (did you mean ...?)` for a mistyped key, by the spelling of the whole and of its last name."""
        best = max([*self.types, *self.groups], key=lambda name: _likeness(key, name))
        return f" (did you mean {best!r}?)" if _likeness(key, best) >= 0.55 else ""


def _likeness(typed: str, name: str) -> float:
    """How alike two dotted keys are, from 0 to 1: `train.lr` is nearer to `optim.lr` than to `train.steps`."""
    pairs = [(typed.replace("/", "."), name)]
    pairs.append((pairs[0][0].rpartition(".")[2], name.rpartition(".")[2]))
    return sum(difflib.SequenceMatcher(None, a, b).ratio() for a, b in pairs) / 2


def names(config_dir: str | None = None) -> Names:
    """The names of this zeroray and of the YAML groups in `config_dir`, whose options must have names of their own."""
    leaves = leaf_types()
    nodes = frozenset(key[:at] for key in leaves for at, letter in enumerate(key) if letter == ".")
    groups = _groups_in(CONF_FOLDER)
    for group, options in _groups_in(config_dir).items() if config_dir else []:
        taken = sorted({*options} & {*groups.get(group, [])})
        if taken:
            raise refuse("--config-dir", config_dir, f"{group}={taken[0]} exists in zeroray", "give it another name")
        if group not in groups:
            raise refuse(
                "--config-dir",
                config_dir,
                f"{group!r} is no group{nearest(group, [*groups])}",
                f"groups: {', '.join(groups)}",
            )
        groups[group] = sorted([*groups[group], *options])
    return Names(leaves, nodes, groups)


def _groups_in(folder: str) -> dict[str, list[str]]:
    """The groups of a folder: each subfolder with YAML in it, and the names of those files."""
    if not os.path.isdir(folder):
        raise refuse("--config-dir", folder, "no such folder", "name a folder with experiment/*.yaml in it")
    found = {}
    for group in sorted(os.listdir(folder)):
        path = os.path.join(folder, group)
        files = os.listdir(path) if os.path.isdir(path) else []
        options = sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))
        if options:
            found[group] = options
    return found


def refuse_unknown(key: str, value: object, known: Names) -> BadRequest:
    """The error for a key that is not there."""
    parent = key.rpartition(".")[0]
    if parent in known.types:
        return refuse(key, value, f"{parent} is {describe(known.types[parent])}", f"set it whole: {example(parent)}")
    below = [name.removeprefix(f"{parent}.") for name in known.types if parent and name.startswith(f"{parent}.")]
    way_out = f"keys of {parent}: {', '.join(below)}" if below else EVERY_KEY
    return refuse(key, value, f"no such key{known.nearest(key)}", way_out)


def is_dict(kind: Any) -> bool:
    """Whether a type is a free-form dict."""
    return typing.get_origin(kind) is dict


def choices(kind: Any) -> list[str]:
    """The values that may be typed for a type, when they are few: members of an enum, true and false."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return [member.name for member in kind]
    return ["true", "false"] if kind is bool else []


def describe(kind: Any) -> str:
    """A type in words a person who types values understands."""
    words: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    if kind in words:
        return words[kind]
    if choices(kind):
        return f"one of {', '.join(choices(kind))}"
    if isinstance(kind, types.UnionType):
        inner = [describe(part) for part in typing.get_args(kind) if part is not type(None)]
        return f"{' or '.join(inner)} or null"
    if typing.get_origin(kind) is list:
        return f"a list, each {describe(typing.get_args(kind)[0])}"
    return "names with values" if is_dict(kind) else "a value"


def example(key: str) -> str:
    """`key=value` as it could be typed: its default where that is a value."""
    kind = leaf_types()[key]
    value = defaults()[key]
    if typing.get_origin(kind) is list:
        return f"{key}=[{','.join(value or ['a', 'b'])}]"
    if is_dict(kind):
        return f"{key}.name=value"
    if value is None:
        return f"{key}={EXAMPLES.get(key, 'name')}"  # null is what it is already
    return f"{key}={str(value).lower() if kind is bool else value}"
