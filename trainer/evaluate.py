"""Held-out loss, perplexity and bits per byte, beside the unigram token model of the same text.

    sums over all ranks of (token losses, labels, bytes the labels stand for)
        loss = losses / labels          nats per token
        ppl  = exp(loss)
        bpb  = losses / ln 2 / bytes    comparable between tokenizers, which loss and ppl are not

The unigram model (every token at its training frequency, add-one smoothed) is what a model reaches that has learned
nothing but how often tokens occur; a model that does not beat it clearly has not learned to read.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from conf.refusal import BadRequest
from data_pipeline.stages import prepared_at
from data_pipeline.stream import Batch, heldout_batches
from data_pipeline.unigram import unigram_bits_per_byte
from trainer.export import load_export, special_ids

EVAL_ROWS = 8
Sums = list[float]


def summary(sums: Sums) -> dict[str, float]:
    """Loss, perplexity and bits per byte from [sum of losses, labels, bytes]; NaN without anything to predict."""
    losses, labels, text_bytes = sums
    if labels == 0 or text_bytes == 0:
        return {"loss": math.nan, "ppl": math.nan, "bpb": math.nan}
    loss = losses / labels
    return {"loss": loss, "ppl": math.exp(min(loss, 700.0)), "bpb": losses / math.log(2) / text_bytes}


def evaluate(
    loss_sum: Callable[[Batch], float], batches: Iterable[Batch], reduce: Callable[[Sums], Sums]
) -> dict[str, float]:
    """Evaluate `batches` (the same number on every rank); `reduce` sums over the ranks."""
    losses, labels, text_bytes = 0.0, 0.0, 0.0
    for batch in batches:
        losses += loss_sum(batch)
        labels += batch.num_labels
        text_bytes += batch.text_bytes
    return summary(reduce([losses, labels, text_bytes]))


def model_loss_sum(model: nn.Module) -> Callable[[Batch], float]:
    """The loss sum of a bare model on one batch, without gradients."""
    device = next(model.parameters()).device

    def loss_sum(batch: Batch) -> float:
        with torch.no_grad():
            return float(model(**batch.to(device).tensors()))

    return loss_sum


def text_batches(texts: Iterable[str], tokenizer_folder: str, row_tokens: int) -> Iterator[Batch]:
    """Rows of plain texts, one batch a row: [bos, tokens, eos] cut into pieces of `row_tokens`."""
    tokenizer = Tokenizer.from_file(os.path.join(tokenizer_folder, "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # a text that spells <|eos|> is text, as it was in training
    special = special_ids(tokenizer_folder)
    for text in texts:
        spelled = tokenizer.encode(text, add_special_tokens=False).ids
        ids = [special["bos_token_id"], *spelled, special["eos_token_id"]]
        pieces = [ids[i : i + row_tokens + 1] for i in range(0, len(ids) - 1, row_tokens)]
        for number, piece in enumerate(pieces):
            # All of a text's bytes are counted with its first piece: only sums over whole texts are reported.
            yield one_row(piece, len(text.encode()) if number == 0 else 0)


def one_row(piece: list[int], text_bytes: int) -> Batch:
    """One document piece of n+1 ids as a batch of one row of n tokens."""
    ids = torch.tensor(piece, dtype=torch.int64)
    length = len(piece) - 1
    return Batch(
        input_ids=ids[:-1][None],
        labels=ids[1:][None],
        position_ids=torch.arange(length)[None],
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        num_labels=length,
        text_bytes=text_bytes,
        sample_ids=[],
    )


def evaluate_export(
    export_folder: str,
    tokens_folder: str | None,
    text_files: list[str],
    row_tokens: int,
    max_rows: int | None = None,
) -> dict[str, Any]:
    """Evaluate an exported model on a run's held-out rows and on text files; returns {set: {loss, ppl, bpb}}.

    With `tokens_folder` the set `heldout` comes with `heldout_unigram`, the unigram token model on the same rows.
    Raises ValueError when a text file is missing or not UTF-8.
    """
    model = load_export(export_folder)
    losses = model_loss_sum(model)
    results: dict[str, Any] = {}
    if tokens_folder is not None:
        data = prepared_at(tokens_folder)
        view, token_bytes = data.view("heldout", row_tokens), data.token_bytes()
        rows = view.num_rows if max_rows is None else min(max_rows, view.num_rows)
        results["heldout"] = evaluate(losses, heldout_batches(view, token_bytes, 0, 1, EVAL_ROWS, rows), list)
        baseline = unigram_bits_per_byte(view, data.token_counts(), token_bytes, rows)
        results["heldout_unigram"] = {"bpb": baseline}
    for path in text_files:
        results[path] = evaluate(losses, text_batches([read_text(path)], export_folder, row_tokens), list)
    return results


def read_text(path: str) -> str:
    """The text of a UTF-8 file; raises ValueError with the way out otherwise."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError as error:
        raise BadRequest(f"--text {path}: no such file") from error
    except UnicodeDecodeError as error:
        raise BadRequest(
            f"--text {path}: not UTF-8 at byte {error.start}; convert it first, for example with iconv"
        ) from error
