"""`zeroray generate` and `zeroray eval`: using the exported model of a run, or an exported folder that lies anywhere.

exported(model, words) -> Exported       a name becomes <run>/export; a folder is taken as it is
generate_command, evaluate_command       the work is trainer.generate's and trainer.evaluate's
"""

import argparse
import os
import re
from dataclasses import dataclass
from typing import Any, TextIO

from cluster.run_folder import RunFolder
from conf.refusal import BadRequest
from conf.saved import load_run
from conf.schema import Run
from data_pipeline.store import read_json

LONGEST_ROW = 1024
FIGURES = ("loss", "ppl", "bpb")


@dataclass(frozen=True)
class Exported:
    """An exported folder, and the run it came from when that is known."""

    folder: str
    run_folder: RunFolder | None
    run: Run | None

    @property
    def row_tokens(self) -> int:
        """The row length to measure with: the run's, or what the model's positions allow."""
        if self.run is not None:
            return self.run.data.row_tokens
        config = read_json(f"{self.folder}/config.json")
        return min(LONGEST_ROW, int(config.get("max_position_embeddings", LONGEST_ROW)))


def exported(model: str, words: list[str], command: str) -> Exported:
    """The exported folder that `model` means; raises ValueError when there is none."""
    if os.path.isdir(model) and os.path.exists(os.path.join(model, "config.json")):
        path = os.path.abspath(model)
        place, name = os.path.split(os.path.dirname(path))
        beside = RunFolder(place, name) if os.path.basename(path) == "export" else None
        known = beside is not None and os.path.exists(beside.yaml_path)
        return Exported(path, beside if known else None, load_run(beside.yaml_path) if known and beside else None)
    if os.sep in model:
        raise BadRequest(f"{command} {model}: no exported model there (config.json is missing)\na run's export/ is one")
    from cluster.lookup import find

    folder = find([model, *words], command)
    path = f"{folder.path}/export"
    if not os.path.exists(f"{path}/config.json"):
        raise BadRequest(
            f"run.name={folder.name}: has no exported model yet ({path})\n"
            f"see how far it is: zeroray status {folder.name}; the stages train and export make it"
        )
    return Exported(path, folder, load_run(folder.yaml_path))


def generate_command(said: argparse.Namespace, out: TextIO) -> int:
    """Print each prompt with what the model adds."""
    overrides = [word for word in said.words if re.match(r"paths\.(runs|store)=", word)]
    prompts = [word for word in said.words if word not in overrides]
    if not prompts:
        raise BadRequest('zeroray generate: no prompt\nfor example zeroray generate quickstart "def read(path):"')
    found = exported(said.model, overrides, "zeroray generate")
    from trainer.generate import generate

    added = generate(found.folder, prompts, said.tokens, said.temperature, said.seed)
    out.write("\n\n".join(prompt + text for prompt, text in zip(prompts, added, strict=True)) + "\n")
    return 0


def evaluate_command(said: argparse.Namespace, out: TextIO) -> int:
    """Measure the model on the run's held-out rows and on the text files that were named."""
    found = exported(said.model, said.words, "zeroray eval")
    tokens = tokens_folder(found)
    if tokens is None and not said.text:
        raise BadRequest(
            f"zeroray eval {said.model}: the held-out text of this model is not here\n"
            "name text files to measure: --text FILE ..."
        )
    from trainer.evaluate import evaluate_export

    figures = evaluate_export(found.folder, tokens, said.text, found.row_tokens, said.rows)
    if said.json:
        from cluster.console import print_json

        print_json(figures)
    else:
        out.write(f"{found.folder}\n{figures_text(figures)}")
    return 0


def tokens_folder(found: Exported) -> str | None:
    """The token shards that the run was trained on; None when they are not here."""
    if found.run is None or found.run_folder is None:
        return None
    folder = f"{found.run.paths.store}/tokens/{found.run_folder.stage_key('tokens')}"
    return folder if os.path.exists(f"{folder}/manifest.json") else None


def figures_text(figures: dict[str, Any]) -> str:
    """Loss, perplexity and bits per byte of every set, aligned."""
    rows = [["", *FIGURES]]
    for name, values in figures.items():
        rows.append([name.replace("_", " "), *(f"{values[f]:.4f}" if f in values else "-" for f in FIGURES)])
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines) + "\n"
