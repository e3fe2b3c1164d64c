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
            usual = type(thing).__dataclass_fields__[name].default  # type: ignore[attr-defined]
            way_out = f"for example {prefix}.{name}={usual}"
            raise refuse(f"{prefix}.{name}", getattr(thing, name), "must be above 0", way_out)
