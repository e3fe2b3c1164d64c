"""What a person types, `key=value`, checked before Hydra sees it: every name exists, nothing is executed, nothing lost.

    checked(texts, names) -> list[str]            overrides that Hydra accepts, or a ValueError of at most three lines
    jobs(texts, names) -> list[list[str]]         the same for --multirun: one list of overrides for each job
    refuse_resolvers(key, text)                   `${a.b}` is fine, `${oc.env:...}` and every other resolver is not

Hydra alone would accept `+train.stepz=1` and drop it without a word; here `+key` of a known key means the key, and of
an unknown one is refused. Below free-form dicts (`data.filters`, `zero.extra`, `*.options`) new names need no `+`.
"""

import itertools
import re
from collections.abc import Iterator
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, ValueType
from hydra.errors import HydraException

from conf.identity import flatten
from conf.keys import EVERY_KEY, Names, example, is_dict, refuse_unknown
from conf.refusal import BadRequest, refuse
from conf.registry import nearest
from conf.saved import wrong_type

REGISTERED = ("model", "optim", "schedule")  # groups whose `name` is looked up in conf.registry
QUOTING = "quote a value that has , = : # { [ ( ~ or letters beyond ASCII:"


def checked(texts: list[str], names: Names) -> list[str]:
    """The overrides as Hydra takes them; raises ValueError for the first that cannot be, and for several values."""
    overrides = [parse(text, names) for text in texts]
    for override in overrides:
        if override.is_sweep_override():
            raise _several_values(override)
    accepted = [_accepted(override, names) for override in overrides]
    if "experiment=null" in accepted:  # Hydra has no word for choosing nothing again
        last = max(at for at, text in enumerate(accepted) if text == "experiment=null")
        accepted = [text for at, text in enumerate(accepted) if at > last or not text.startswith("experiment=")]
    return accepted


def jobs(texts: list[str], names: Names) -> list[list[str]]:
    """Every combination of the values of overrides such as `train.steps=1,2`, the last override varying fastest."""
    every = [list(dict.fromkeys(_spread(parse(text, names), names))) for text in texts]
    return [list(job) for job in itertools.product(*every)]


def swept(texts: list[str], names: Names) -> list[bool]:
    """Which of the overrides have several values."""
    return [parse(text, names).is_sweep_override() for text in texts]


def parse(text: str, names: Names) -> Override:
    """One override by Hydra's grammar; raises ValueError that says how to quote when it does not parse."""
    key, equals, value = text.partition("=")
    if not equals and not text.startswith("~"):
        raise _no_value(text, names)
    try:
        override: Override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        plain = value.replace('"', "").replace("'", "")
        raise refuse(key, value, "is not written as Hydra reads values", f"{QUOTING} '{key}=\"{plain}\"'") from error
    if override.package is not None:
        raise refuse(override.key_or_group, value, "a group has one place; '@' is not used here", EVERY_KEY)
    return override


def refuse_resolvers(key: str, text: str) -> None:
    """Refuse every interpolation that is not the plain name of another key."""
    rest = re.sub(r"\$\{[A-Za-z_.][\w.]*\}", "", text)
    found = re.search(r"(?<!\\)(?:\\\\)*\$\{", rest)
    if not found:
        return
    if "oc.env" in rest:
        reason, way_out = "secrets are read only from the environment, never into a run", "set the variable and leave"
        raise refuse(key, text, reason, f"{way_out} {key} out; a run is written to disk and shown to others")
    raise refuse(key, text, "only ${other.key} may be filled in", r"write \${ for the text itself")


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a value, keys and items of lists and dicts included."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, str):
        yield value


def _accepted(override: Override, names: Names) -> str:
    """One override in the form that Hydra applies; raises ValueError for what is unknown or must not be."""
    key, value = override.key_or_group, _value_text(override)
    _refuse_execution(key, override)
    kind = names.kind(key)
    if kind == "group":
        return _group_choice(override, value, names)
    if kind == "free" or (kind == "leaf" and is_dict(names.types[key])):
        return _free_form(override, value, names)
    if kind == "node":
        below = next(leaf for leaf in names.types if leaf.startswith(f"{key}."))
        raise refuse(key, value, "is a group of keys", f"set them one by one, for example {example(below)}")
    if kind == "unknown":
        raise refuse_unknown(key, value, names)
    if override.is_delete():
        raise BadRequest(f"~{key}: a key cannot be removed\nset it instead, for example {example(key)}")
    if names.types[key] is bool and not isinstance(override.value(), bool | str):
        raise wrong_type(key, value, bool)  # OmegaConf would take 2 for true
    return f"{key}={value}"


def _group_choice(override: Override, value: str, names: Names) -> str:
    """A group and one of its options."""
    group, options = override.key_or_group, names.groups[override.key_or_group]
    chosen = override.value()
    if group == "experiment" and (override.is_delete() or chosen is None):
        return "experiment=null"
    way_out = f"options: {', '.join(options)}"
    if override.is_delete():
        raise BadRequest(f"~{group}: a run has one of each group\n{way_out}")
    if chosen not in options:
        if isinstance(chosen, dict):
            way_out += f"; its keys are set one by one: {group}.key=value"
        elif group in REGISTERED and isinstance(chosen, str):
            way_out += f"; what a plugin registered is named by {group}.name={chosen}"
        raise refuse(group, value, f"no such option{nearest(str(chosen), options)}", way_out)
    return f"{group}={value}"


def _free_form(override: Override, value: str, names: Names) -> str:
    """A name in a free-form dict: new or not, added without ceremony, or removed with `~`."""
    key = override.key_or_group
    whole = names.free_form_of(key) == key
    if override.is_delete() and not whole:
        return f"~{key}"
    if override.is_delete():
        raise BadRequest(f"~{key}: removes all at once\nremove one by one: ~{key}.name")
    if whole and not (isinstance(override.value(), dict) and override.value()):
        raise refuse(key, value, "takes names with values", f"for example {example(key)}; ~{key}.name removes one")
    return f"++{key}={value}"


def _refuse_execution(key: str, override: Override) -> None:
    """Refuse what would make Hydra import something or read the environment."""
    value = override.value() if override.value_type == ValueType.ELEMENT else None
    named = [*key.replace("/", ".").split("."), *(part for name in flatten(value) for part in name.split("."))]
    if "_target_" in named:
        reason = "a run holds values only; nothing in it is imported or called"
        raise refuse(key, _value_text(override), reason, "register your code by name: plugins=[module]")
    if key.startswith(("hydra.", "hydra/")) or key == "hydra":
        raise refuse(key, _value_text(override), "Hydra's own settings are not part of a run", EVERY_KEY)
    refuse_resolvers(key, _value_text(override))


def _spread(override: Override, names: Names) -> Iterator[str]:
    """Each single override that one with several values stands for."""
    if not override.is_sweep_override():
        yield str(override.input_line)
        return
    key = override.get_key_element()
    chosen: Any = override.value()
    if isinstance(chosen, Glob):
        if override.key_or_group not in names.groups:
            raise refuse(key, _value_text(override), "glob(...) is for groups", f"groups: {', '.join(names.groups)}")
        yield from (f"{key}={option}" for option in chosen.filter(names.groups[override.key_or_group]))
        return
    if not override.is_discrete_sweep():
        raise refuse(key, _value_text(override), "cannot be counted off", f"use {key}=1,2 or {key}=range(1,4)")
    yield from (f"{key}={value}" for value in override.sweep_string_iterator())


def _several_values(override: Override) -> BadRequest:
    """The error for a comma that means several values where one run is asked for."""
    key, value = override.key_or_group, _value_text(override)
    way_out = f"one run for each: add --multirun; a list: {key}=[{value}]; a text with a comma: '{key}=\"{value}\"'"
    return refuse(key, value, "several values for one run", way_out)


def _no_value(text: str, names: Names) -> BadRequest:
    """The error for a word without `=`: perhaps an option whose group was left out, perhaps a key."""
    owners = [group for group, options in names.groups.items() if text in options]
    if text in names.types:
        return BadRequest(f"{text}: an override is written key=value\nfor example {example(text)}")
    guess = f" (did you mean '{owners[-1]}={text}'?)" if owners else names.nearest(text)
    return BadRequest(f"{text}: an override is written key=value{guess}\n{EVERY_KEY}")


def _value_text(override: Override) -> str:
    """The value as it was typed."""
    return str(override.input_line).partition("=")[2]
