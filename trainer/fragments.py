"""Fragments: the pieces of fp32 weights and optimizer state that a rank holds, by parameter name and place.

    Holder                 what an engine offers: the pieces it holds (views on live storage), and the live weights
    owned(holder, ...)     the pieces this rank writes: where every rank holds everything, each owns an equal part
    check(holder)          each piece against the live weight: a partition under a wrong name is found here
    cover_error(...)       whether pieces of all ranks are every value exactly once
    fill(holder, reader)   the pieces from a checkpoint of any world size and stage
    gather(holder, ...)    whole weights on rank 0, one at a time
    Held                   these as methods, the half of an engine that a checkpoint uses

A fragment is (name, kind, start, 1-D tensor): `kind` is "param" for the fp32 weight, or the optimizer's state name;
`start` is its place in the flattened parameter. World size and stage appear nowhere.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

PARAM = "param"
BLOCK_VALUES = 1 << 20  # values read or summed at a time, so that little memory is needed beyond what is held
Reader = Callable[[str, str, int, int], Tensor]


class CheckpointError(RuntimeError):
    """A checkpoint that must not be written, or cannot be read; the message names the parameter or the file."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """`tensor` (1-D, a view on live storage) holds values start.. of the flattened parameter `name`."""

    name: str
    kind: str
    start: int
    tensor: Tensor

    @property
    def count(self) -> int:
        """How many values it holds."""
        return self.tensor.numel()

    def part(self, begin: int, end: int) -> "Fragment":
        """The part of it within [begin, end) of the flattened parameter; may be empty."""
        low = max(begin, self.start)
        high = max(low, min(end, self.start + self.count))
        return Fragment(self.name, self.kind, low, self.tensor[low - self.start : high - self.start])


class Holder(Protocol):
    """How an engine shows what it holds. `replicated` says that every rank holds everything."""

    replicated: bool

    def shapes(self) -> dict[str, list[int]]:
        """The whole shape of every parameter."""

    def kinds(self) -> set[str]:
        """What there is of every parameter: "param" and the optimizer's state names."""

    def held(self) -> Iterator[Fragment]:
        """Every piece this rank holds, as views on live storage."""

    def live(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, whole and flattened, as the next forward will use it (collective)."""

    def scalars(self) -> dict[str, dict[str, float]]:
        """The optimizer's numbers per parameter."""

    def set_scalars(self, scalars: dict[str, dict[str, float]]) -> None:
        """Set the optimizer's numbers per parameter."""

    def publish(self) -> None:
        """After the held weights were changed: make the next forward use them (collective)."""


def numel(shape: list[int]) -> int:
    """How many values a shape has."""
    return int(torch.Size(shape).numel())


def owned(holder: Holder, rank: int, world_size: int) -> Iterator[Fragment]:
    """The pieces that this rank owns, none of them empty."""
    if not holder.replicated:
        yield from (f for f in holder.held() if f.count)
        return
    sizes = {name: numel(shape) for name, shape in holder.shapes().items()}
    for fragment in holder.held():
        size = sizes[fragment.name]
        part = fragment.part(size * rank // world_size, size * (rank + 1) // world_size)
        if part.count:
            yield part


def check(holder: Holder) -> None:
    """Compare every held weight with the live one, bit by bit; raises CheckpointError naming the first that differs.

    The loop goes on after the first difference: other ranks take part in the gathering of every parameter.
    """
    pieces: dict[str, list[Fragment]] = defaultdict(list)
    for fragment in holder.held():
        if fragment.kind == PARAM:
            pieces[fragment.name].append(fragment)
    wrong: list[str] = []
    sums: dict[str, Tensor] = {}
    for name, whole in holder.live():
        sums[name] = bit_sum(whole)
        for piece in pieces[name]:
            lived = whole[piece.start : piece.start + piece.count]
            if not torch.equal(bits(lived), bits(piece.tensor.to(lived.device, lived.dtype))):
                wrong.append(
                    f"{name}: what would be saved as values {piece.start} to {piece.start + piece.count} is not there"
                )
    if dist.is_initialized():
        wrong += [f"{name}: it is not the same on all ranks, what would be saved is not" for name in unequal(sums)]
    if wrong:
        raise CheckpointError(f"{wrong[0]} in the live parameter ({len(wrong)} fragments differ)")


def bits(values: Tensor) -> Tensor:
    """The bits of fp32 or bf16 values as integers, so that NaN equals itself."""
    return values.view(torch.int32 if values.element_size() == 4 else torch.int16)


def bit_sum(values: Tensor) -> Tensor:
    """A sum over the bits; block by block, since a sum of integers copies what it sums to int64."""
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for begin in range(0, values.numel(), BLOCK_VALUES):
        total += bits(values[begin : begin + BLOCK_VALUES]).sum(dtype=torch.int64)
    return total


def unequal(sums: dict[str, Tensor]) -> list[str]:
    """The names whose sums are not the same on all ranks (collective)."""
    ours = torch.stack(list(sums.values()))
    most = torch.stack([ours, -ours])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return [name for name, differs in zip(sums, (most[0] != -most[1]).tolist(), strict=True) if differs]


def cover_error(
    shapes: dict[str, list[int]], kinds: set[str], spans: Iterable[tuple[str, str, int, int]]
) -> str | None:
    """Why the spans (name, kind, start, count) are not every value of every kind exactly once; None when they are."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for name, kind, start, count in spans:
        found[name, kind].append((start, start + count))
    wanted = {(name, kind) for name in shapes for kind in kinds}
    for name, kind in sorted(found.keys() - wanted):
        return f"{name}: there is {kind} of it, but the model has no such parameter"
    for name, kind in sorted(wanted):
        end = 0
        for low, high in sorted(found[name, kind]):
            if low != end:
                fault = "missing" if low > end else "twice"
                return f"{name}: values {min(low, end)} to {max(low, end)} of {kind} are {fault}"
            end = high
        if end != numel(shapes[name]):
            return f"{name}: values {end} to {numel(shapes[name])} of {kind} are missing"
    return None


@torch.no_grad()
def fill(holder: Holder, reader: Reader, scalars: dict[str, dict[str, float]]) -> None:
    """Fill every held piece from `reader`, set the scalars, and make the model use them."""
    for fragment in holder.held():
        for begin in range(0, fragment.count, BLOCK_VALUES):
            part = fragment.tensor[begin : begin + BLOCK_VALUES]
            part.copy_(reader(fragment.name, fragment.kind, fragment.start + begin, part.numel()))
    holder.set_scalars(scalars)
    holder.publish()


@torch.no_grad()
def gather(holder: Holder, rank: int, world_size: int, device: torch.device) -> dict[str, Tensor]:
    """The whole fp32 weights on rank 0 (CPU), one at a time; empty elsewhere."""
    pieces: dict[str, list[Fragment]] = defaultdict(list)
    for fragment in owned(holder, rank, world_size):
        if fragment.kind == PARAM:
            pieces[fragment.name].append(fragment)
    whole: dict[str, Tensor] = {}
    for name, shape in holder.shapes().items():
        buffer = torch.zeros(numel(shape), dtype=torch.float32, device=device)
        for piece in pieces[name]:
            buffer[piece.start : piece.start + piece.count] = piece.tensor
        if world_size > 1:
            # Summed as integers: all but one rank add 0, so every bit arrives, that of -0.0 too.
            dist.reduce(buffer.view(torch.int32), 0)
        if rank == 0:
            whole[name] = buffer.cpu().view(shape)
    return whole


class Held:
    """The checkpoint half of an engine, the same for every engine that has a holder."""

    holder: Holder
    rank: int
    world_size: int
    device: torch.device

    def shapes(self) -> dict[str, list[int]]:
        """The whole shape of every trained parameter, by name."""
        return self.holder.shapes()

    def kinds(self) -> set[str]:
        """What there is of every parameter: "param" and the optimizer's state names."""
        return self.holder.kinds()

    def fragments(self) -> Iterator[Fragment]:
        """What this rank owns."""
        return owned(self.holder, self.rank, self.world_size)

    def scalars(self) -> dict[str, dict[str, float]]:
        """The optimizer's numbers per parameter."""
        return self.holder.scalars()

    def load_fragments(self, reader: Reader, scalars: dict[str, dict[str, float]]) -> None:
        """Fill weights and optimizer state and make the model use them."""
        fill(self.holder, reader, scalars)

    def check_fragments(self) -> None:
        """Compare every held fragment with the live parameter."""
        check(self.holder)

    def full_state(self) -> dict[str, Tensor]:
        """The whole fp32 weights by name on rank 0; empty elsewhere."""
        return gather(self.holder, self.rank, self.world_size, self.device)
