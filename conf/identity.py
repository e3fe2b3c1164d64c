"""What makes two runs the same: the scientific part of a config, its hash, and how two of them differ.

plain(run)         the whole tree as JSON values
scientific(run)    the part that changes the result
content_hash(x)    the name of what is made from x
differences(a, b)  the dotted keys in which two trees differ
"""

import dataclasses
import enum
import hashlib
import json
from typing import Any


def plain(value: object) -> Any:
    """A dataclass tree as plain JSON values: enums by name, dataclasses as dicts."""
    if isinstance(value, enum.Enum):
        return value.name
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value


def scientific(value: object) -> Any:
    """The part of a dataclass tree that changes the result, as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = [f for f in dataclasses.fields(value) if not f.metadata.get("operational")]
        return {f.name: scientific(getattr(value, f.name)) for f in kept}
    return plain(value)


def content_hash(value: object) -> str:
    """SHA-256 (hex) of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of dicts as dotted keys; lists and scalars are leaves."""
    if isinstance(tree, dict) and tree:
        return {k: v for name, sub in tree.items() for k, v in flatten(sub, f"{prefix}{name}.").items()}
    return {prefix[:-1]: tree}


def differences(before: Any, after: Any) -> list[tuple[str, Any, Any]]:
    """The dotted scientific keys in which two `scientific` trees differ, with both values."""
    a, b = flatten(before), flatten(after)
    missing = "(unset)"
    return [
        (k, a.get(k, missing), b.get(k, missing)) for k in sorted({*a, *b}) if a.get(k, missing) != b.get(k, missing)
    ]
