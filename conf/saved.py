"""A run as a file: the composed `Run` written as plain YAML, and read back without Hydra.

    to_yaml(run) -> str       what `zeroray run --cfg job --resolve` prints and a run folder keeps as run.yaml
    load_run(path) -> Run     reads it; nothing in it is resolved, imported or executed
    from_plain(Run, tree)     the inverse of `conf.schema.plain`: every value checked against its type

Keys that are missing take their default; keys that are unknown are refused with the nearest valid name.
"""

import dataclasses
import enum
import re
import types
import typing
from typing import Any

import yaml

from conf.identity import plain
from conf.keys import choices, describe, example, leaf_types, names, refuse_unknown
from conf.refusal import BadRequest, refuse
from conf.registry import nearest
from conf.schema import Run


def dump(tree: Any) -> str:
    """Plain values as YAML, in their own order; a single value as itself."""
    if not isinstance(tree, dict | list):
        return f"{tree}\n"
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def to_yaml(run: Run) -> str:
    """The run as YAML that `load_run` reads back to an equal run."""
    return dump(plain(run))


def load_run(path: str) -> Run:
    """Read a run from a YAML file written by `to_yaml`; raises ValueError naming the file when it is damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise refuse(path, "...", f"not YAML: {reason[:200]}", "it is written by zeroray: restore it") from error
    if not isinstance(tree, dict):
        raise refuse(path, "...", "holds no run", "it is written by zeroray: restore it")
    return run_from(tree)


def run_from(tree: dict[str, Any]) -> Run:
    """Build a `Run` from plain values; raises ValueError for an unknown key or a wrong type."""
    run = from_plain(Run, tree, "")
    assert isinstance(run, Run)
    return run


def from_plain(kind: Any, value: Any, key: str) -> Any:
    """Return `value` as an object of type `kind`; `key` is its dotted name, for the error."""
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _dataclass_from(typing.cast(type, kind), value, key)
    if isinstance(kind, types.UnionType):
        inner = next(part for part in typing.get_args(kind) if part is not type(None))
        return None if value is None else from_plain(inner, value, key)
    if typing.get_origin(kind) is list and isinstance(value, list):
        return [from_plain(typing.get_args(kind)[0], item, key) for item in value]
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        return dict(value)
    if isinstance(kind, type):
        return _scalar_from(kind, value, key)
    raise wrong_type(key, value, kind)


def _dataclass_from(kind: type, value: Any, key: str) -> Any:
    """A dataclass from a dict of its fields."""
    if not isinstance(value, dict):
        raise refuse(key, value, "is a group of keys", f"write its keys below it, for example {_first_leaf(key)}")
    hints = typing.get_type_hints(kind)
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in hints:
            raise refuse_unknown(f"{prefix}{name}", value[name], names())
    return kind(**{name: from_plain(hints[name], item, f"{prefix}{name}") for name, item in value.items()})


def _scalar_from(kind: type, value: Any, key: str) -> Any:
    """An enum member, number, text or truth value, without guessing between them."""
    if issubclass(kind, enum.Enum) and value in kind.__members__:
        return kind[value]
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-3, without a point, as a text
        except ValueError:
            raise wrong_type(key, value, kind) from None
    if type(value) is kind:
        return value
    raise wrong_type(key, value, kind)


def wrong_type(key: str, value: Any, kind: Any, part: str | None = None) -> BadRequest:
    """The error for a value of the wrong type; `part` is what is wrong in a value that is a list."""
    leaf = re.sub(r"\[\d+\]$", "", key)
    inner = next(iter(typing.get_args(kind)), kind) if typing.get_origin(kind) is list else kind
    hint = nearest(str(part or value), choices(inner)) if choices(inner) else ""
    return refuse(
        leaf, value, f"must be {describe(leaf_types().get(leaf, kind))}{hint}", f"for example {example(leaf)}"
    )


def _first_leaf(node: str) -> str:
    """Some key below a node, to show how it is written."""
    return next(key for key in leaf_types() if key.startswith(f"{node}."))
