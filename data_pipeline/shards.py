"""Token shards: ordinary uncompressed WebDataset tars that are read by offset.

A sample of the tar is a pair of arrays: `00000000.tokens.npy` (uint16, or uint32 above 65,536 ids; the tokens of many
whole documents, about 1 MiB) and `00000000.docs.npy` (int64, the number of tokens of each of them). Headers are fixed
(mtime 0, one owner), so equal documents give equal bytes. The manifest keeps where each array's data begins, after the
tar and npy headers, so that nobody ever scans a tar; any WebDataset reader still can.
"""

import hashlib
import io
import os
from contextlib import ExitStack
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from conf.refusal import BadRequest
from data_pipeline import store

MEMBER_BYTES = 1 << 20
CHUNK_BYTES = 8 << 20
TAR_BLOCK = 512


def token_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


class HashingFile:
    """Passes writes on and hashes them, whole and by chunks of `CHUNK_BYTES`."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.bytes = 0
        self.whole = hashlib.sha256()
        self.chunk = hashlib.sha256()
        self.chunks: list[str] = []

    def write(self, data: bytes) -> int:
        """Write all of `data`."""
        view = memoryview(data)
        while view:
            part = view[: CHUNK_BYTES - self.bytes % CHUNK_BYTES]
            self.file.write(part)
            self.chunk.update(part)
            self.bytes += len(part)
            if self.bytes % CHUNK_BYTES == 0:
                self.chunks.append(self.chunk.hexdigest())
                self.chunk = hashlib.sha256()
            view = view[len(part) :]
        self.whole.update(data)
        return len(data)

    def chunk_sha256(self) -> list[str]:
        """The hashes of all chunks, the last one of what is left."""
        return [*self.chunks, self.chunk.hexdigest()] if self.bytes % CHUNK_BYTES else self.chunks


class ShardWriter:
    """Writes one shard; it appears whole, under its name, when the `with` block ends well and it has documents."""

    def __init__(self, folder: str, name: str, split: str, vocab_size: int) -> None:
        self.folder, self.name, self.split = folder, name, split
        self.dtype = token_dtype(vocab_size)
        self.members: list[dict[str, Any]] = []
        self.entry: dict[str, Any] | None = None
        self._documents: list[np.ndarray] = []
        self._held = 0
        self._stack = ExitStack()
        self._file: HashingFile | None = None
        self._tar: Any = None

    def __enter__(self) -> "ShardWriter":
        return self

    def add(self, ids: list[int]) -> None:
        """Add one document's tokens."""
        array = np.asarray(ids, dtype=self.dtype)
        self._documents.append(array)
        self._held += array.nbytes
        if self._held >= MEMBER_BYTES:
            self._flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            try:
                self._flush()
                if self._tar is not None:
                    self._tar.close()
            except BaseException:
                self._discard()
                raise
        if self._file is not None:
            self.entry = self._entry(self._file)

    def _discard(self) -> None:
        """What tarfile's destructor still wants to write goes nowhere."""
        if self._file is not None:
            self._file.file = io.BytesIO()

    def _flush(self) -> None:
        if not self._documents:
            return
        if self._file is None:  # opened by the first member: a split without documents leaves no file
            import webdataset as wds  # noqa: PLC0415 (loads torch where it is installed: 2 s that readers must not pay)

            self._file = HashingFile(self._stack.enter_context(store.AtomicFile(f"{self.folder}/{self.name}")))
            self._tar = wds.TarWriter(self._file, user="zeroray", group="zeroray", mtime=0, encoder=False)
        tokens = np.concatenate(self._documents)
        lengths = np.array([len(d) for d in self._documents], np.int64)
        docs_bytes, tokens_bytes = _npy(lengths), _npy(tokens)
        key, begin = f"{len(self.members):08d}", self._tar.tarstream.offset
        self._tar.write({"__key__": key, "docs.npy": docs_bytes, "tokens.npy": tokens_bytes})
        second = begin + TAR_BLOCK + -(-len(docs_bytes) // TAR_BLOCK) * TAR_BLOCK  # the writer sorts names: docs first
        self.members.append(
            {
                "name": f"{key}.tokens.npy",
                "data_offset": second + TAR_BLOCK + len(tokens_bytes) - tokens.nbytes,
                "bytes": tokens.nbytes,
                "tokens": len(tokens),
                "docs_offset": begin + TAR_BLOCK + len(docs_bytes) - lengths.nbytes,
                "documents": len(lengths),
            }
        )
        self._documents, self._held = [], 0

    def _entry(self, file: HashingFile) -> dict[str, Any]:
        return {
            "name": self.name,
            "split": self.split,
            "bytes": file.bytes,
            "sha256": file.whole.hexdigest(),
            "chunk_bytes": CHUNK_BYTES,
            "chunk_sha256": file.chunk_sha256(),
            "dtype": np.dtype(self.dtype).name,
            "documents": sum(m["documents"] for m in self.members),
            "tokens": sum(m["tokens"] for m in self.members),
            "members": self.members,
        }


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def check_sizes(folder: str, shards: list[dict[str, Any]]) -> None:
    """The cheap check on opening: raises ValueError naming the shard that is missing or has another size."""
    for shard in shards:
        path = f"{folder}/{shard['name']}"
        size = os.path.getsize(path) if os.path.exists(path) else -1
        if size != shard["bytes"]:
            found = "is missing" if size < 0 else f"has {size} bytes"
            raise BadRequest(
                f"shard {path}: {found}, its manifest says {shard['bytes']} bytes\n"
                "restore it, or delete the folder and run the same command again"
            )


def verify(folder: str, shards: list[dict[str, Any]]) -> None:
    """Read every shard and compare hashes; raises ValueError naming the shard and the byte range that is damaged."""
    check_sizes(folder, shards)
    for shard in shards:
        buffer = np.memmap(f"{folder}/{shard['name']}", dtype=np.uint8, mode="r")
        for number in range(len(shard["chunk_sha256"])):
            verify_chunk(folder, shard, buffer, number)


def verify_chunk(folder: str, shard: dict[str, Any], buffer: np.ndarray, number: int) -> None:
    """Compare the hash of one chunk of a shard's bytes; raises ValueError naming the shard and the byte range."""
    begin = number * shard["chunk_bytes"]
    end = min(begin + shard["chunk_bytes"], shard["bytes"])
    if hashlib.sha256(buffer[begin:end].tobytes()).hexdigest() != shard["chunk_sha256"][number]:
        raise BadRequest(
            f"shard {folder}/{shard['name']}: damaged within bytes {begin} to {end}\n"
            "restore it, or delete the folder and run the same command again"
        )
