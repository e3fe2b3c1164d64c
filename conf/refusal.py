"""The one form of a user's error, and the checks that are needed again and again."""

import json
import math


class BadRequest(ValueError):  # noqa: N818 (what it is, not what went wrong)
    """Something the user can mend: told in a few lines, exit code 2. Any other ValueError is an error of some code."""


def refuse(key: str, value: object, reason: str, way_out: str) -> BadRequest:
    """The one form of a user's error: dotted key, value, reason, and what to do."""
    shown = json.dumps(value) if value is None or isinstance(value, bool) else value  # as it is typed: null, true
    return BadRequest(f"{key}={shown}: {reason}\n{way_out}")


def positive(prefix: str, thing: object, *names: str) -> None:
    """Refuse any of the attributes `names` of `thing` that is not a finite number above zero."""
    for name in names:
        if not 0 < getattr(thing, name) < math.inf:
            way_out = f"for example {prefix}.{name}={usual(thing, name)}"
            raise refuse(f"{prefix}.{name}", getattr(thing, name), "must be above 0", way_out)


def at_most(prefix: str, thing: object, **limits: int) -> None:
    """Refuse any attribute of `thing` above its limit: a slip of the keyboard would fill memory before it is seen."""
    for name, limit in limits.items():
        if getattr(thing, name) > limit:
            key = f"{prefix}.{name}"
            raise refuse(
                key, getattr(thing, name), f"must be at most {limit}", f"for example {key}={usual(thing, name)}"
            )


def from_0_to_1(prefix: str, thing: object, *names: str, with_1: bool) -> None:
    """Refuse any of the attributes `names` of `thing` outside 0 to 1; 1 itself only `with_1`."""
    for name in names:
        value = getattr(thing, name)
        if not 0 <= value <= 1 or (value == 1 and not with_1):
            said = "must be from 0 to 1" if with_1 else "must be from 0 to below 1"
            raise refuse(f"{prefix}.{name}", value, said, f"for example {prefix}.{name}={usual(thing, name)}")


def usual(thing: object, name: str) -> object:
    """The default of a dataclass field."""
    return type(thing).__dataclass_fields__[name].default  # type: ignore[attr-defined]
