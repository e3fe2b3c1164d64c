"""From rows to the tensors of a step: the only file of the data rooms that needs torch.

    TrainStream(view, order, token_bytes).micro_batches(step, rank, world_size, micro_rows) -> [Batch, ...]
    heldout_batches(view, token_bytes, rank, world_size, micro_rows, max_rows)              -> Batch, ...

A rank takes its contiguous slice of the step's samples. All ranks get the same number of micro-batches of the same
shapes; where the batch does not divide, the last rows are padding rows, whose labels are all -100. Shapes: R rows of
L tokens. A batch is a function of (view, order, step, rank, world size, micro_rows) and of nothing that came before.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from conf.refusal import BadRequest
from data_pipeline.order import OrderProgram
from data_pipeline.packing import IGNORE, RowView


@dataclass(kw_only=True, slots=True)
class Batch:
    """One micro-batch: the tensors of R rows of L tokens, and the plain facts about them."""

    input_ids: Tensor  # [R, L] int64
    labels: Tensor  # [R, L] int64, -100 where nothing is predicted: a document's bos, padding rows
    position_ids: Tensor  # [R, L] int64, from 0 in each document
    cu_seqlens: Tensor  # [documents + 1] int32, boundaries in the flattened R*L tokens; every row start is one
    num_labels: int
    text_bytes: int  # bytes of text that the labels stand for
    sample_ids: list[int]  # global sample numbers of the real rows

    def tensors(self) -> dict[str, Tensor]:
        """What a model and an objective see."""
        return {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "position_ids": self.position_ids,
            "cu_seqlens": self.cu_seqlens,
        }

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=True),
        )


def rank_slice(count: int, rank: int, world_size: int) -> tuple[int, int, int]:
    """The slice [begin, end) of `count` things that is a rank's, and the number of places every rank has."""
    return count * rank // world_size, count * (rank + 1) // world_size, -(-count // world_size)


def make_batch(
    view: RowView, rows: list[int], sample_ids: list[int], num_places: int, token_bytes: np.ndarray
) -> Batch:
    """Stack `rows` and padding rows up to `num_places` into one batch."""
    length = view.row_tokens
    input_ids = np.zeros((num_places, length), np.int64)
    labels = np.full((num_places, length), IGNORE, np.int64)
    boundaries = [np.array([place * length], np.int64) for place in range(len(rows), num_places)]
    for place, row in enumerate(rows):
        input_ids[place], labels[place], starts = view.example(row)
        boundaries.insert(place, starts + place * length)
    cu_seqlens = np.concatenate([*boundaries, [num_places * length]])
    starts_of = np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
    predicted = labels[labels != IGNORE]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy((np.arange(num_places * length) - starts_of).reshape(num_places, length)),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        num_labels=len(predicted),
        text_bytes=int(token_bytes[predicted].sum(dtype=np.int64)),
        sample_ids=sample_ids,
    )


@dataclass(slots=True)
class TrainStream:
    """The micro-batches of any step for any rank; stateless, so resuming is asking for the next step."""

    view: RowView
    order: OrderProgram
    token_bytes: np.ndarray

    def micro_batches(self, step: int, rank: int, world_size: int, micro_rows: int) -> list[Batch]:
        """A rank's micro-batches of a step; raises ValueError when the order was made for another view."""
        if self.order.view_hash(step) != self.view.view_hash:
            raise BadRequest(
                f"order: step {step} was planned for other rows than those of {self.view.folder}\n"
                "the corpus, the tokenizer or data.row_tokens changed; use another run.name"
            )
        samples = self.order.samples(step)
        begin, end, num_places = rank_slice(len(samples), rank, world_size)
        mine = list(samples[begin:end])
        _, rows = self.order.locate(np.array(mine, np.int64))
        places = _micro_places(num_places, micro_rows)
        return [make_batch(self.view, rows[a:b].tolist(), mine[a:b], b - a, self.token_bytes) for a, b in places]


def _micro_places(num_places: int, micro_rows: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + micro_rows, num_places)) for begin in range(0, num_places, micro_rows)]


def heldout_batches(  # noqa: PLR0917 (the order of the contract)
    view: RowView, token_bytes: np.ndarray, rank: int, world_size: int, micro_rows: int, max_rows: int
) -> Iterator[Batch]:
    """A rank's share of the first `max_rows` rows; its sample ids are row numbers."""
    begin, end, num_places = rank_slice(min(view.num_rows, max_rows), rank, world_size)
    mine = list(range(begin, end))
    for a, b in _micro_places(num_places, micro_rows):
        yield make_batch(view, mine[a:b], mine[a:b], b - a, token_bytes)
