"""Settings that pass through to code of others, by name and type: what our own parts take in `*.options`.

    refuse_options(key, given, known)     every name must be in `known`, every value of the type there
    refuse_any(key, given, part)          a part of ours that takes none

Parts of other packages check their own options.
"""

from typing import Any

from conf.refusal import BadRequest, refuse
from conf.registry import nearest

# Keywords of torch.optim.AdamW that are no key of `optim` already. `capturable` is for CUDA graphs and `differentiable`
# for a gradient through the optimizer: neither happens here.
ADAMW: dict[str, type] = {"amsgrad": bool, "foreach": bool, "fused": bool, "maximize": bool}


def refuse_options(key: str, given: dict[str, Any], known: dict[str, type]) -> None:
    """Refuse the first name that is not known, and the first value that is not of its name's type."""
    for name, value in given.items():
        if name not in known:
            reason = f"no such setting passes through{nearest(name, sorted(known))}"
            raise refuse(f"{key}.{name}", value, reason, f"known: {', '.join(sorted(known))}")
        if known[name] is bool and not isinstance(value, bool):
            raise wrong(f"{key}.{name}", value, "must be true or false", "true")
        if known[name] is int and not is_count(value):
            raise wrong(f"{key}.{name}", value, "must be a whole number of 0 or more", "1000000")


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of 0 or more; 5e8 is one, as DeepSpeed's users write it."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole and not isinstance(value, bool) and value >= 0


def wrong(key: str, value: Any, reason: str, sample: str) -> BadRequest:
    """The refusal of a value of the wrong type."""
    return refuse(key, value, reason, f"for example {key}={sample}")


def refuse_any(key: str, given: dict[str, Any], part: str) -> None:
    """Refuse options of a part of ours that takes none: they would be dropped without a word."""
    for name, value in given.items():
        raise refuse(f"{key}.{name}", value, f"{part} takes no options", f"leave out {key}.{name}")
