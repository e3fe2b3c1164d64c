"""Hydra's one door: what a person types becomes one typed `Run`, or one short error.

    compose(["experiment=quickstart", "train.steps=50"]) -> Run     the way in
    composed(overrides, config_dir, resolve) -> dict                the same as plain values, checked
    explained(error, typed) -> ValueError                           Hydra's and OmegaConf's errors in our form
    to_yaml(run), load_run(path)                                    a run as a file (conf/saved.py)

Overrides are checked first (conf/overrides.py), then Hydra composes `run.yaml` with the groups over the schema, then
every value is walked once more, because YAML of `--config-dir` may hold what an override may not: unknown keys,
`_target_`, resolvers. Hydra writes no folder, changes no directory and configures no logging, since only its compose
function is used. Regenerate the committed quickstart: `python -m conf.compose experiment=quickstart`.
"""

import os
import re
import sys
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from conf.identity import flatten
from conf.keys import EVERY_KEY, Names, describe, example, leaf_types, names, refuse_unknown
from conf.overrides import checked, refuse_resolvers, texts_in
from conf.refusal import BadRequest, refuse
from conf.registry import nearest
from conf.saved import dump, load_run, run_from, to_yaml, wrong_type
from conf.schema import Run

__all__ = ["compose", "composed", "dump", "load_run", "to_yaml"]

ConfigStore.instance().store(name="zeroray_run", node=Run)
NEEDS_PATH = ("text", "jsonl")  # readers of ours that read nothing without corpus.path


def compose(overrides: list[str], config_dir: str | None = None) -> Run:
    """Return the run that `overrides` describe; raises ValueError of at most three lines."""
    run = run_from(composed(overrides, config_dir))
    if run.corpus.reader in NEEDS_PATH and not run.corpus.path:
        way_out = "for example corpus.path=/data/*.jsonl or corpus=python_stdlib"
        raise refuse("corpus.path", "null", f"corpus={run.corpus.name} reads files, and none are named", way_out)
    return run


def composed(overrides: list[str], config_dir: str | None = None, resolve: bool = True) -> dict[str, Any]:
    """The run as plain values in the schema's order; `resolve` fills in `${other.key}`."""
    known = names(config_dir)
    typed = checked(overrides, known)
    try:
        config = _hydra_compose(typed, config_dir)
        raw = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
        assert isinstance(raw, dict)
        _check_values(config, flatten(raw), known)
        tree = OmegaConf.to_container(config, resolve=resolve, enum_to_str=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise explained(error, typed, known) from error
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _hydra_compose(typed: list[str], config_dir: str | None) -> DictConfig:
    """Hydra's composition of `run.yaml`, with `config_dir` searched after our own folder."""
    extra = []
    if config_dir is not None:
        place = QuotedString(f"file://{os.path.abspath(config_dir)}", Quote.double).with_quotes()
        extra = [f"hydra.searchpath=[{place}]"]
    with hydra.initialize_config_module("conf", job_name="zeroray", version_base="1.3"):
        config: DictConfig = hydra.compose("run", overrides=[*typed, *extra])
    return config


def _check_values(config: DictConfig, leaves: dict[str, Any], known: Names) -> None:
    """Refuse what YAML can smuggle in: unknown keys, `_target_`, resolvers, and interpolations that lead nowhere."""
    for key, value in leaves.items():
        if "_target_" in key.split("."):
            reason = "a run holds values only; nothing in it is imported or called"
            raise refuse(key, value, reason, "register your code by name: plugins=[module]")
        if known.kind(key) == "unknown":
            raise refuse_unknown(key, value, known)
        if value == "???":
            raise refuse(key, value, "has no value yet", f"for example {example(key)}")
        texts = [text for text in texts_in(value) if "${" in text]
        for text in texts:
            refuse_resolvers(key, text)
        if texts:
            _check_interpolation(config, key, texts[0], known)


def _check_interpolation(config: DictConfig, key: str, value: str, known: Names) -> None:
    """Fill in one `${other.key}` to see that it leads somewhere."""
    try:
        node = OmegaConf.select(config, key)
        if OmegaConf.is_config(node):
            OmegaConf.to_container(node, resolve=True)
    except ValidationError as error:
        reason = f"gives no {describe(leaf_types().get(key, str))}".replace("no a ", "no ")
        raise refuse(key, value, reason, f"for example {example(key)}") from error
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        other = re.search(r"Interpolation key '(.+)' not found", reason)
        hint = known.nearest(other.group(1)) if other else ""
        raise refuse(key, value, f"{reason}{hint}", f"for example {example(known.free_form_of(key) or key)}") from error


def explained(error: Exception, typed: list[str], known: Names) -> BadRequest:
    """Hydra's, OmegaConf's and YAML's errors as ours: the dotted key, the reason, the way out."""
    text = str(error.__cause__ or error)
    if isinstance(error, yaml.YAMLError):
        return BadRequest(f"{' '.join(text.split())[:300]}\nmend this file, or choose another option of its group")
    if isinstance(error, MissingConfigException):
        return _no_such_file(error, known)
    found = re.search(r"full_key: (\S+)", text) or re.search(r"full_key: (\S+)", str(error))
    key = found.group(1) if found else ""
    leaf = re.sub(r"\[\d+\]$", "", key)
    if leaf in leaf_types():
        return wrong_type(key, *_wrong_value(leaf, typed, text))
    if key:
        where = re.search(r"In '([^']+)'", str(error))
        return refuse_unknown(key, f"... (in {where.group(1)}.yaml)" if where else "...", known)
    gone = re.search(r"Could not delete from config. '(.+)' does not exist", str(error))
    if gone:
        return BadRequest(f"~{gone.group(1)}: is not there to be removed\n{EVERY_KEY}")
    return BadRequest("\n".join([*str(error).strip().splitlines()[:2], EVERY_KEY]))


def _no_such_file(error: MissingConfigException, known: Names) -> BadRequest:
    """A defaults list in YAML names an option that does not exist."""
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    where = re.search(r"In '([^']+)'", str(error))
    options = known.groups.get(group, [*known.groups])
    reason = f"no such option{nearest(option, options)}, named in {where.group(1) if where else 'run'}.yaml"
    return refuse(group or "defaults", option, reason, f"options: {', '.join(options)}")


def _wrong_value(key: str, typed: list[str], text: str) -> tuple[str, Any, str]:
    """The value that was refused, as typed where it was typed; its type; and the part of it that OmegaConf names."""
    values = [text.partition("=")[2] for text in typed if text.lstrip("+").partition("=")[0] == key]
    quoted = re.search(r"[Vv]alue '(.*?)'", text)
    part = quoted.group(1) if quoted else "..."
    return values[-1] if values else part, leaf_types()[key], part


if __name__ == "__main__":
    try:
        sys.stdout.write(to_yaml(compose(sys.argv[1:])))
    except BadRequest as error:
        sys.exit(f"{error}")
