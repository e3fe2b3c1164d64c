"""Filters: trivial reasons to leave a document out.

A filter is a function `f(text, **params) -> str | None` in `FILTERS`: the reason when the document is dropped, None
when it passes. `data.filters={name: {param: value}}` chooses them. Every filter sees every document, and its verdict
is kept in the document index; what is kept is decided when tokens are made. The reason that is counted is that of the
first filter in the config's order that gave one.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from conf.refusal import refuse
from conf.registry import FILTERS

Filter = Callable[[str], str | None]


@FILTERS.register("min_chars")
def min_chars(text: str, limit: int) -> str | None:
    """Drop documents of fewer than `limit` characters."""
    return "too_short" if len(text) < limit else None


@FILTERS.register("max_chars")
def max_chars(text: str, limit: int) -> str | None:
    """Drop documents of more than `limit` characters."""
    return "too_long" if len(text) > limit else None


@FILTERS.register("min_words")
def min_words(text: str, limit: int) -> str | None:
    """Drop documents of fewer than `limit` words between white space."""
    return "too_few_words" if len(text.split()) < limit else None


@FILTERS.register("max_line_chars")
def max_line_chars(text: str, limit: int) -> str | None:
    """Drop documents with a line of more than `limit` characters: data, not prose or code."""
    return "long_line" if max(map(len, text.split("\n"))) > limit else None


def build_filters(config: dict[str, Any]) -> dict[str, Filter]:
    """The chosen filters with their parameters bound; raises ValueError for unknown names and parameters."""
    return {name: _bind(name, params or {}) for name, params in config.items()}


def judge(name: str, chosen: Filter, text: str, file: str) -> str | None:
    """A filter's verdict; raises ValueError naming the filter and the file when it fails or answers anything else."""
    try:
        reason = chosen(text)
    except Exception as error:  # another package's code: whatever it raises is told with the place
        raise ValueError(f"data.filters.{name}: failed on a document of {file}: {error!r}") from error
    if reason is not None and not isinstance(reason, str):
        raise ValueError(f"data.filters.{name}: answered {reason!r} for a document of {file}; a reason or None is due")
    return reason


def _bind(name: str, params: dict[str, Any]) -> Filter:
    chosen = FILTERS.get(name)
    signature = inspect.signature(chosen)
    try:
        signature.bind("", **params)
    except TypeError as error:
        raise refuse(f"data.filters.{name}", params, str(error), f"{name} takes {signature}") from error
    return functools.partial(chosen, **params)
