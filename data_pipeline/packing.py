"""Rows are a view of token shards: row length and packing change without writing a token.

All documents of a split, in shard order, are one long sequence of T tokens; row i is tokens[i*L : i*L + L + 1], its
last token being the label of the one before. So there are (T - 1) // L rows, each token but the first is predicted
once, and finding a row is arithmetic: which member (bisect over the members' first tokens), which bytes (an offset).

    RowView(folder, split, L)   opens in O(members); checks the sizes of the shards
    .row(i)                     tokens [L+1] and the starts of documents within the first L
    .example(i)                 input_ids [L], labels [L] (-100 where a document's bos would be predicted), starts
    .verify()                   reads everything and compares hashes
"""

from bisect import bisect_right
from typing import Any

import numpy as np

from conf.identity import content_hash
from data_pipeline import shards
from data_pipeline.manifest import Manifest

PACKING_VERSION = 1
IGNORE = -100
# Every open map holds a file descriptor, and 1024 of them is the usual limit of a process.
MAX_OPEN_SHARDS = 256
MAX_MEMBER_STARTS = 4096


class RowView:
    """The packed rows of one split of a finished tokens stage."""

    def __init__(self, folder: str, split: str, row_tokens: int) -> None:
        made = Manifest.load(folder)
        self.folder, self.split, self.row_tokens = folder, split, row_tokens
        self.shards = [s for s in made.shards if s["split"] == split]
        shards.check_sizes(folder, self.shards)
        self._members = [(number, m) for number, s in enumerate(self.shards) for m in s["members"]]
        sizes = [m["tokens"] for _, m in self._members]
        self._first = [0, *np.cumsum(np.array(sizes, np.int64)).tolist()]
        self.num_tokens: int = self._first[-1]
        self.num_rows = max(self.num_tokens - 1, 0) // row_tokens
        self.view_hash = content_hash([made.content_sha256, split, row_tokens, "concatenate", PACKING_VERSION])
        self._maps: dict[int, np.memmap] = {}
        self._arrays: dict[int, np.ndarray] = {}
        self._starts: dict[int, np.ndarray] = {}
        self._verified: set[tuple[int, int]] = set()

    def verify(self) -> None:
        """Compare the hashes of all shards of the split; raises ValueError naming the damaged one."""
        shards.verify(self.folder, self.shards)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Row i: its tokens, int64 [row_tokens + 1], and where documents start within the first row_tokens.

        The first start is always 0: the row's own, whether or not a document begins there.
        """
        tokens, starts = self._cut(i)
        return tokens, starts[:-1] if starts[-1] == self.row_tokens else starts

    def example(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row i as input_ids, labels and starts; the label that would be a document's bos is -100."""
        tokens, starts = self._cut(i)
        labels = tokens[1:].copy()
        inner = starts[1:] if starts[0] == 0 else starts
        labels[inner - 1] = IGNORE
        return tokens[:-1], labels, starts[:-1] if starts[-1] == self.row_tokens else starts

    def _cut(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The row's tokens, and all starts in [0, row_tokens]: the last position is a label only."""
        if not 0 <= i < self.num_rows:
            raise IndexError(f"row {i} of {self.num_rows}")
        begin = i * self.row_tokens
        end = begin + self.row_tokens + 1
        member = bisect_right(self._first, begin) - 1
        if end <= self._first[member + 1]:
            tokens, starts = self._piece(member, begin, end)
            out = tokens.astype(np.int64)
        else:
            out, starts = self._across(member, begin, end)
        if len(starts) == 0 or starts[0] != 0:
            starts = np.concatenate(([0], starts))
        return out, starts

    def _across(self, member: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        pieces = []
        while begin < end:
            until = min(end, self._first[member + 1])
            pieces.append((begin, *self._piece(member, begin, until)))
            begin, member = until, member + 1
        row_begin = pieces[0][0]
        tokens = np.concatenate([t for _, t, _ in pieces]).astype(np.int64)
        return tokens, np.concatenate([s + (first - row_begin) for first, _, s in pieces])

    def _piece(self, member: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens begin..end of the split, all inside one member, and the document starts among them."""
        array = self._arrays.get(member)
        if array is None:
            array = self._open(member)
        starts = self._starts[member]
        first = self._first[member]
        lower, upper = begin - first, end - first
        a, b = starts.searchsorted((lower, upper))
        return array[lower:upper], starts[a:b] - lower

    def _open(self, member: int) -> np.ndarray:
        number, facts = self._members[member]
        if len(self._arrays) >= MAX_MEMBER_STARTS or (number not in self._maps and len(self._maps) >= MAX_OPEN_SHARDS):
            self._maps.clear()
            self._arrays.clear()
            self._starts.clear()
        shard = self.shards[number]
        if number not in self._maps:
            self._maps[number] = np.memmap(f"{self.folder}/{shard['name']}", dtype=np.uint8, mode="r")
        buffer = np.asarray(self._maps[number])
        self._verify(number, buffer, facts)
        lengths = _typed(buffer, facts["docs_offset"], facts["documents"], np.dtype(np.int64))
        self._starts[member] = np.cumsum(lengths) - lengths
        self._arrays[member] = _typed(buffer, facts["data_offset"], facts["tokens"], np.dtype(shard["dtype"]))
        return self._arrays[member]

    def _verify(self, number: int, buffer: np.ndarray, facts: dict[str, Any]) -> None:
        """Check the chunks that a member lies in, each once: nothing damaged is trained on, and opening stays cheap."""
        shard = self.shards[number]
        size = np.dtype(shard["dtype"]).itemsize
        ranges = ((facts["data_offset"], facts["tokens"] * size), (facts["docs_offset"], facts["documents"] * 8))
        for begin, length in ranges:
            step = shard["chunk_bytes"]
            for chunk in range(begin // step, -(-(begin + length) // step)):
                if (number, chunk) not in self._verified:
                    shards.verify_chunk(self.folder, shard, buffer, chunk)
                    self._verified.add((number, chunk))


def _typed(buffer: np.ndarray, offset: int, count: int, dtype: np.dtype) -> np.ndarray:
    return buffer[offset : offset + count * dtype.itemsize].view(dtype)
