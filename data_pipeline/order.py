"""Order is a program: which row is seen when, as an append-only, hashed list of segments, and no other state.

A sample is one row at one place of the order; its number is global and never depends on ranks. Step s (0 is the first)
takes `program.samples(s)`. `locate` maps sample numbers to (epoch, row):

    sample -> segment (bisect) -> place = start + (sample - from_sample), pushed past skipped ranges
           -> epoch = place // rows, position = place % rows -> row = keyed permutation of [0, rows) of that epoch

The permutation is a Feistel network on just enough bits, walked until it lands inside [0, rows): a bijection for every
number of rows, O(1) memory, no shuffle buffer. So resuming costs the same at step 10 and at step 10^6, and another
batch size, row view or a skipped range is one more segment.
"""

import dataclasses
import hashlib
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conf.identity import content_hash
from conf.refusal import BadRequest, refuse

VERSION = 1
ROUNDS = 6


def _round_keys(key: int, epoch: int) -> list[np.uint64]:
    seeds = (hashlib.sha256(f"zeroray order {key} {epoch} {r}".encode()).digest() for r in range(ROUNDS))
    return [np.uint64(int.from_bytes(s[:8], "little")) for s in seeds]


def _mix(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """A 64-bit finalizer (splitmix64) of x and the key."""
    x = x ^ key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def _feistel(x: np.ndarray, bits: int, keys: list[np.uint64]) -> np.ndarray:
    """A bijection of [0, 2**bits): the halves take turns to be changed by a hash of the other."""
    low_bits = np.uint64((bits + 1) // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << np.uint64(bits // 2)) - np.uint64(1)
    low, high = x & low_mask, x >> low_bits
    for number, key in enumerate(keys):
        if number % 2:
            high = high ^ (_mix(low, key) & high_mask)
        else:
            low = low ^ (_mix(high, key) & low_mask)
    return (high << low_bits) | low


def permute(positions: np.ndarray, rows: int, key: int, epoch: int) -> np.ndarray:
    """Where the positions of an epoch lie in a keyed permutation of [0, rows)."""
    bits, keys = max((rows - 1).bit_length(), 1), _round_keys(key, epoch)
    out = _feistel(positions.astype(np.uint64), bits, keys)
    outside = np.flatnonzero(out >= rows)
    while len(outside):  # fewer than half of all values lie outside, so this ends soon
        out[outside] = _feistel(out[outside], bits, keys)
        outside = outside[out[outside] >= rows]
    return out.astype(np.int64)


@dataclass(kw_only=True, slots=True)
class Segment:
    """From `from_step` on: so many rows a step, of these sources, through this view, shuffled by this key.

    A source is {name, rows, weight, start}: `start` is its place at `from_sample`. `skipped` are half-open ranges of
    places that are not seen.
    """

    from_step: int
    from_sample: int
    batch_rows: int
    key: int
    view: str
    sources: list[dict[str, Any]]
    skipped: list[list[int]] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class OrderProgram:
    """The list of segments; only ever appended to."""

    segments: list[Segment]
    version: int = VERSION

    @classmethod
    def start(cls, key: int, batch_rows: int, rows: int, view_hash: str) -> "OrderProgram":
        """The program of a new run over one source; raises ValueError when there is no row to see."""
        if rows < 1:
            raise refuse(
                "data.row_tokens", "", "the corpus is too small for a single row", "use shorter rows or more text"
            )
        source = {"name": "corpus", "rows": rows, "weight": 1.0, "start": 0}
        first = Segment(from_step=0, from_sample=0, batch_rows=batch_rows, key=key, view=view_hash, sources=[source])
        return cls(segments=[first])

    def append(self, segment: Segment) -> None:
        """Add a segment; it begins at the sample where its step begins, not before the last segment does."""
        if len(segment.sources) != 1:
            raise refuse("corpus", len(segment.sources), "an order of several sources is not built yet", "use one")
        expected = self.samples(segment.from_step).start
        if segment.from_step < self.segments[-1].from_step or segment.from_sample != expected:
            raise ValueError(
                f"order: a segment from step {segment.from_step}, sample {segment.from_sample} does not follow; "
                f"step {segment.from_step} begins at sample {expected}\norder programs are only appended to"
            )
        self.segments.append(segment)

    def next_place(self, step: int) -> int:
        """The place of the source at which `step` begins: the `start` of a segment that goes on in the same view."""
        segment = self.segments[self._segment_of_step(step)]
        sample = self.samples(step).start
        return int(_places(segment, np.array([sample], np.int64))[0])

    def samples(self, step: int) -> range:
        """The global sample numbers of a step."""
        segment = self.segments[self._segment_of_step(step)]
        begin = segment.from_sample + (step - segment.from_step) * segment.batch_rows
        return range(begin, begin + segment.batch_rows)

    def view_hash(self, step: int) -> str:
        """The row view that a step reads through."""
        return self.segments[self._segment_of_step(step)].view

    def locate(self, sample_numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The epochs and rows of sample numbers, which may lie in any segments."""
        numbers = np.asarray(sample_numbers, np.int64)
        firsts = np.array([s.from_sample for s in self.segments], np.int64)
        owners = np.searchsorted(firsts, numbers, side="right") - 1
        epochs, rows = np.empty_like(numbers), np.empty_like(numbers)
        for owner in np.unique(owners):
            mine = owners == owner
            segment = self.segments[owner]
            num_rows = segment.sources[0]["rows"]
            places = _places(segment, numbers[mine])
            epochs[mine], positions = places // num_rows, places % num_rows
            rows[mine] = _permute_epochs(positions, epochs[mine], num_rows, segment.key)
        return epochs, rows

    def _segment_of_step(self, step: int) -> int:
        if step < 0:
            raise IndexError(f"step {step}")
        return bisect_right(self.segments, step, key=lambda s: s.from_step) - 1

    @property
    def hash(self) -> str:
        """The chained hash of the segments: programs with the same hash give the same order."""
        chain = f"zeroray order {self.version}"
        for segment in self.segments:
            chain = content_hash([chain, dataclasses.asdict(segment)])
        return chain

    def to_json(self) -> dict[str, Any]:
        """Plain JSON with the hash."""
        return {"version": self.version, "segments": [dataclasses.asdict(s) for s in self.segments], "hash": self.hash}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "OrderProgram":
        """Read it back; raises ValueError when the version or the hash does not fit."""
        if value["version"] != VERSION:
            raise BadRequest(f"order program: version {value['version']}, this program reads {VERSION}")
        program = cls(segments=[Segment(**s) for s in value["segments"]])
        if program.hash != value["hash"]:
            raise BadRequest("order program: damaged, its segments do not match its hash")
        return program


def _places(segment: Segment, samples: np.ndarray) -> np.ndarray:
    places = segment.sources[0]["start"] + (samples - segment.from_sample)
    for first, last in sorted(segment.skipped):
        places = np.where(places >= first, places + (last - first), places)
    return np.asarray(places)


def _permute_epochs(positions: np.ndarray, epochs: np.ndarray, num_rows: int, key: int) -> np.ndarray:
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        mine = epochs == epoch
        rows[mine] = permute(positions[mine], num_rows, key, int(epoch))
    return rows
