"""Tensors in one file: ordinary safetensors, written as a stream and read by verified slices.

    write(path, fragments)        header first, then the values one fragment after another, hashed on the way
    VerifiedFile(path, facts)     reads any span of bytes; only the chunks it touches are read, and each is hashed first

The library's own writer holds a second copy of everything, and its reader maps the file, so that what was verified is
not what is read later. The format itself is 8 bytes of header length, a JSON header, and the values.
"""

import hashlib
import json
import os
from collections import OrderedDict
from typing import Any, BinaryIO

import torch
from torch import Tensor

from data_pipeline.store import AtomicFile
from trainer.faults import point
from trainer.fragments import CheckpointError, Fragment

CHUNK_BYTES = 4 << 20
VALUE_BYTES = 4


class ChunkHasher:
    """Writes to a file and keeps the SHA-256 of every `chunk_bytes` of it."""

    def __init__(self, file: BinaryIO, chunk_bytes: int) -> None:
        self.file, self.chunk_bytes = file, chunk_bytes
        self.bytes = 0
        self.digests: list[str] = []
        self.digest = hashlib.sha256()

    def write(self, data: memoryview) -> None:
        """Write and hash `data`."""
        while len(data):
            part = data[: self.chunk_bytes - self.bytes % self.chunk_bytes]
            self.file.write(part)
            self.digest.update(part)
            self.bytes += len(part)
            data = data[len(part) :]
            if self.bytes % self.chunk_bytes == 0:
                self.close_chunk()

    def close_chunk(self) -> None:
        """End the present chunk."""
        self.digests.append(self.digest.hexdigest())
        self.digest = hashlib.sha256()

    def facts(self) -> dict[str, Any]:
        """Size and hashes of what was written."""
        if self.bytes % self.chunk_bytes:
            self.close_chunk()
        return {"bytes": self.bytes, "chunk_bytes": self.chunk_bytes, "chunk_sha256": self.digests}


def as_bytes(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(values.numpy()).cast("B")  # type: ignore[arg-type]


def header(pieces: list[Fragment]) -> tuple[bytes, list[int]]:
    """The safetensors header of `pieces`, and the offset of each one's values in the file."""
    entries: dict[str, Any] = {}
    end = 0
    starts = []
    for f in pieces:
        if f.tensor.dtype is not torch.float32:
            raise CheckpointError(f"{f.name}: {f.kind} is {f.tensor.dtype}, checkpoints hold float32 only")
        starts.append(end)
        end += f.count * VALUE_BYTES
        entries[f"{f.kind}/{f.name}/{f.start}"] = {
            "dtype": "F32",
            "shape": [f.count],
            "data_offsets": [starts[-1], end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + s for s in starts]


def write(path: str, pieces: list[Fragment], chunk_bytes: int = CHUNK_BYTES) -> tuple[dict[str, Any], list[int]]:
    """Write `pieces` to `path`, whole and durable; returns the file's facts and the offset of each piece's values."""
    head, offsets = header(pieces)
    with AtomicFile(path) as file:
        hasher = ChunkHasher(file, chunk_bytes)
        hasher.write(memoryview(head))
        for piece in pieces:
            point("checkpoint.in_tensors")
            hasher.write(as_bytes(piece.tensor.detach().cpu().contiguous()))
    return hasher.facts(), offsets


class VerifiedFile:
    """A file of known chunk hashes; keeps the few chunks last read."""

    KEPT_CHUNKS = 3

    def __init__(self, path: str, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        self.chunks: OrderedDict[int, bytes] = OrderedDict()
        self.file: BinaryIO | None = None

    def damage(self) -> str | None:
        """What is wrong with the whole file, None when nothing is."""
        try:
            for number in range(len(self.facts["chunk_sha256"])):
                self.chunk(number)
            if os.path.getsize(self.path) != self.facts["bytes"]:
                return f"{self.path}: has {os.path.getsize(self.path)} bytes instead of {self.facts['bytes']}"
        except CheckpointError as error:
            return str(error)
        finally:
            self.close()
        return None

    def values(self, offset: int, count: int) -> Tensor:
        """`count` verified fp32 values from byte `offset` on."""
        values = torch.empty(count, dtype=torch.float32)
        into = as_bytes(values)
        size, done = self.facts["chunk_bytes"], 0
        while done < len(into):
            number, within = divmod(offset + done, size)
            part = self.chunk(number)[within : within + len(into) - done]
            if not part:
                raise CheckpointError(f"{self.path}: ends before byte {offset + len(into)}")
            into[done : done + len(part)] = part
            done += len(part)
        return values

    def chunk(self, number: int) -> bytes:
        """The bytes of one chunk, hashed; raises CheckpointError naming the file when they are not what was written."""
        if number in self.chunks:
            return self.chunks[number]
        if number >= len(self.facts["chunk_sha256"]):
            raise CheckpointError(f"{self.path}: has no chunk {number}")
        size = self.facts["chunk_bytes"]
        try:
            self.file = self.file or open(self.path, "rb")  # noqa: SIM115 (read from many times; closed by close)
            data = os.pread(self.file.fileno(), size, number * size)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from error
        if hashlib.sha256(data).hexdigest() != self.facts["chunk_sha256"][number]:
            raise CheckpointError(f"{self.path}: damaged between byte {number * size} and {number * size + size}")
        self.chunks[number] = data
        if len(self.chunks) > self.KEPT_CHUNKS:
            self.chunks.popitem(last=False)
        return data

    def close(self) -> None:
        """Let go of the file and its chunks."""
        self.chunks.clear()
        if self.file is not None:
            self.file.close()
            self.file = None
