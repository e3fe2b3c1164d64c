"""Readers: from the bytes of a piece of a file to its records, each a `Document` or a `Broken` one.

A reader is a class registered in `READERS`; `read(path, piece, options)` yields records in file order, the same ones
at every reading. A record that cannot be a document (not UTF-8, NUL inside, too long, no text, bad JSON, file that
cannot be opened) is yielded as `Broken` with the reason and the head of its raw bytes; the ones after it go on.

    text            one file is one document (.gz too)
    jsonl           one line is one document; big plain files are split into byte ranges, a line belongs to the range
                    in which it begins
    python_stdlib   the source files of the running interpreter, decoded by their own coding line

The surprise: `offset` of a document inside a .gz file counts decompressed bytes.
"""

import errno
import gzip
import hashlib
import io
import json
import tokenize
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, ClassVar, Protocol, cast

from conf.registry import READERS

HEAD_BYTES = 64 * 1024
BLOCK_BYTES = 1 << 20
# These say something about this machine now, not about the file: they must fail the task, not lose a document.
MACHINE_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR}


@dataclass(slots=True)
class Document:
    """One document: where it stands in its file and its text."""

    file: str
    offset: int
    length: int
    text: str
    id: str | None = None


@dataclass(slots=True)
class Broken:
    """One record that is no document: why, where, and its raw bytes (head and hash of all)."""

    file: str
    offset: int
    length: int
    reason: str
    sha256: str
    head: bytes


Record = Document | Broken


@dataclass(kw_only=True, slots=True)
class ReadOptions:
    """What readers need to know of the config."""

    max_document_bytes: int
    text_key: str = "text"
    id_key: str | None = None


class Reader(Protocol):
    """What a registered reader offers. From a folder it takes the files `include`, not looking into `skip_folders`."""

    include: ClassVar[list[str]]
    skip_folders: ClassVar[list[str]]

    def wants(self, file: dict[str, Any]) -> bool:
        """Whether a listed file (name, size) belongs to the corpus at all."""

    def splits(self, name: str) -> bool:
        """Whether a big file of this name may be read in byte ranges by several tasks."""

    def read(self, path: str, piece: dict[str, Any], options: ReadOptions) -> Iterator[Record]:
        """The records of `piece` (name, size, first, last) of the file at `path`."""


def defect(raw: bytes, limit: int) -> str | None:
    """Why these bytes are no text of a document, or None; that they are UTF-8 is seen by decoding them."""
    if not raw:
        return "empty"
    if len(raw) > limit:
        return "oversize"
    return "nul" if b"\0" in raw else None


def broken_file(path: str, piece: dict[str, Any], reason: str) -> Broken:
    """A whole file that is no document; its bytes are hashed in blocks, as far as they can be read."""
    digest, head, length = hashlib.sha256(), b"", 0
    try:
        with open(path, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                head = head or block[:HEAD_BYTES]
                length += len(block)
                digest.update(block)
    except OSError as error:
        if error.errno in MACHINE_ERRORS:
            raise
    return Broken(piece["name"], 0, length, reason, digest.hexdigest(), head)


@READERS.register("text")
class TextReader:
    """One file, one document."""

    include: ClassVar[list[str]] = ["*"]
    skip_folders: ClassVar[list[str]] = []

    def wants(self, file: dict[str, Any]) -> bool:
        """Every file."""
        return True

    def splits(self, name: str) -> bool:
        """Never: a file is one document."""
        return False

    def decode(self, raw: bytes) -> str:
        """Bytes to text, exactly: no newline translation, no byte-order mark removed."""
        return raw.decode()

    def read(self, path: str, piece: dict[str, Any], options: ReadOptions) -> Iterator[Record]:
        """The one record of the file."""
        name = piece["name"]
        try:
            raw = _read_all(path, options.max_document_bytes)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            yield broken_file(path, piece, "bad_gzip")
            return
        except OSError as error:
            if error.errno in MACHINE_ERRORS:
                raise
            yield Broken(name, 0, 0, "unreadable", hashlib.sha256().hexdigest(), b"")
            return
        reason = defect(raw, options.max_document_bytes)
        try:
            text = "" if reason else self.decode(raw)
        except (UnicodeDecodeError, SyntaxError, LookupError):
            reason = "not_utf8"
        yield broken_file(path, piece, reason) if reason else Document(name, 0, len(raw), text)


@READERS.register("python_stdlib")
class PythonStdlibReader(TextReader):
    """The source of the running interpreter; empty package markers are no documents and are not listed."""

    include: ClassVar[list[str]] = ["*.py"]
    skip_folders: ClassVar[list[str]] = ["__pycache__", "site-packages", "dist-packages"]

    def wants(self, file: dict[str, Any]) -> bool:
        """Every file that holds something."""
        return "broken" in file or file["size"] > 0

    def decode(self, raw: bytes) -> str:
        """Decode by the coding line; UTF-8 where there is none."""
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return raw.decode(encoding)


@READERS.register("jsonl")
class JsonlReader:
    """One line, one document: a JSON object whose `text_key` is the text."""

    include: ClassVar[list[str]] = ["*.jsonl", "*.jsonl.gz", "*.ndjson", "*.ndjson.gz"]
    skip_folders: ClassVar[list[str]] = []

    def wants(self, file: dict[str, Any]) -> bool:
        """Every file."""
        return True

    def splits(self, name: str) -> bool:
        """Plain files split at lines; a compressed file is one stream."""
        return not name.endswith(".gz")

    def read(self, path: str, piece: dict[str, Any], options: ReadOptions) -> Iterator[Record]:
        """The records of all lines that begin inside the piece."""
        try:
            with _open(path) as file:
                yield from self._lines(file, path, piece, options)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            yield broken_file(path, piece, "bad_gzip")
        except OSError as error:
            if error.errno in MACHINE_ERRORS:
                raise
            yield Broken(piece["name"], piece["first"], 0, "unreadable", hashlib.sha256().hexdigest(), b"")

    def _lines(self, file: IO[bytes], path: str, piece: dict[str, Any], options: ReadOptions) -> Iterator[Record]:
        offset, last = piece["first"], piece["last"]
        if offset > 0:  # a line that begins exactly here has its predecessor's newline just before
            file.seek(offset - 1)
            offset += sum(map(len, _line_blocks(file))) - 1
        compressed = path.endswith(".gz")
        num_lines = 0
        while compressed or offset < last:
            raw = file.readline(options.max_document_bytes + 2)
            if not raw:
                break
            length = len(raw)
            if length > options.max_document_bytes + 1:
                record: Record = _long_line(file, raw, piece["name"], offset)
                length = record.length
            else:
                record = parse_line(raw, piece["name"], offset, options)
            yield record
            offset += length
            num_lines += 1
        if num_lines == 0 and piece["first"] == 0:
            yield broken_file(path, piece, "empty")


def _line_blocks(file: IO[bytes]) -> Iterator[bytes]:
    """The rest of the present line in bounded blocks, so that a file without newlines cannot fill memory."""
    while block := file.readline(BLOCK_BYTES):
        yield block
        if block.endswith(b"\n"):
            return


def _long_line(file: IO[bytes], start: bytes, name: str, offset: int) -> Broken:
    digest, length = hashlib.sha256(start), len(start)
    if not start.endswith(b"\n"):
        for block in _line_blocks(file):
            digest.update(block)
            length += len(block)
    return Broken(name, offset, length, "oversize", digest.hexdigest(), start[:HEAD_BYTES])


def parse_line(raw: bytes, name: str, offset: int, options: ReadOptions) -> Record:
    """One line of JSON as a record."""
    text, identity, reason = "", None, defect(raw.strip(), options.max_document_bytes)
    if reason is None:
        try:
            text, identity, reason = _parse(json.loads(raw), options)
        except UnicodeDecodeError:
            reason = "not_utf8"
        except (ValueError, RecursionError):
            reason = "bad_json"
    if reason is None:
        return Document(name, offset, len(raw), text, identity)
    return Broken(name, offset, len(raw), reason, hashlib.sha256(raw).hexdigest(), raw[:HEAD_BYTES])


def _parse(value: Any, options: ReadOptions) -> tuple[str, str | None, str | None]:
    """Text, id and defect of one JSON value."""
    if not isinstance(value, dict):
        return "", None, "not_an_object"
    if options.text_key not in value:
        return "", None, "missing_key"
    text = value[options.text_key]
    if not isinstance(text, str):
        return "", None, "not_text"
    identity = value.get(options.id_key) if options.id_key else None
    try:
        reason = defect(text.encode(), options.max_document_bytes)
        str(identity).encode()
    except UnicodeEncodeError:  # "\ud800" is valid JSON and no text
        reason = "lone_surrogate"
    return text, None if identity is None else str(identity), reason


def _open(path: str) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb"))


def _read_all(path: str, limit: int) -> bytes:
    with _open(path) as file:
        return file.read(limit + 1)
