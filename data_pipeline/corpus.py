"""Which files a corpus is, and how they are split into tasks.

    list_corpus(corpus) -> Listing(root, files)     sorted names relative to one root, with size and mtime
    split_tasks(files, task_bytes, reader) -> tasks  many small files in one task, a big splittable file in many tasks

Names, not paths, go into keys and outputs, so that a corpus that moved (with its times) is still the same corpus.
"""

import fnmatch
import glob
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from conf.refusal import refuse
from conf.registry import READERS
from conf.schema import Corpus


@dataclass(slots=True)
class Listing:
    """The files of a corpus below `root`: dicts of name, size, mtime_ns, and `broken` where one cannot be opened."""

    root: str
    files: list[dict[str, Any]]

    def unsplittable(self, task_bytes: int, reader: Any) -> int:
        """How many files are larger than a task and still have to be one: no more workers will help."""
        return sum(f["size"] > task_bytes and not reader.splits(f["name"]) for f in self.files)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(f["size"] for f in self.files)


def facts(root: str, name: str) -> dict[str, Any]:
    """Name, size and mtime of one file. What is no regular file (a FIFO would block for ever) is marked `broken`."""
    path = os.path.join(root, name)
    if not name.isascii() and name != name.encode(errors="replace").decode():
        shown = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
        return {"name": shown, "size": 0, "mtime_ns": 0, "broken": "file_name_not_utf8"}
    try:
        found = os.stat(path)
    except OSError:
        return {"name": name, "size": 0, "mtime_ns": 0, "broken": "unreadable"}
    if not stat.S_ISREG(found.st_mode):
        return {"name": name, "size": 0, "mtime_ns": 0, "broken": "not_a_file"}
    return {"name": name, "size": found.st_size, "mtime_ns": found.st_mtime_ns}


def list_corpus(corpus: Corpus, ours: Iterable[str] = ()) -> Listing:
    """Find the files of a corpus; raises ValueError when a path does not exist or no file is found.

    `ours` are folders that we write ourselves, runs and store: where they lie within the corpus they are left out.
    """
    own = {os.path.realpath(folder) for folder in ours}
    reader = READERS.get(corpus.reader)()
    roots, paths = [], set()
    for entry in entries_of(corpus):
        root, found = _expand(entry, corpus.include or reader.include, reader.skip_folders, own)
        roots.append(root)
        paths.update(found)
    root = os.path.commonpath(roots)
    names = (os.path.relpath(path, root) for path in paths)
    chosen = [name for name in names if _chosen(name, corpus)]
    files = [f for f in (facts(root, name) for name in sorted(chosen, key=os.fsencode)) if reader.wants(f)]
    if not files:
        raise refuse(
            "corpus.path", corpus.path, "no files found", "name a folder with files, or check corpus.include/exclude"
        )
    return Listing(root, files)


def entries_of(corpus: Corpus) -> list[str]:
    """The absolute paths and globs of a corpus; raises ValueError when one that is no glob does not exist."""
    if corpus.path is None and corpus.reader == "python_stdlib":
        return [sysconfig.get_path("stdlib")]
    entries = [corpus.path] if isinstance(corpus.path, str) else list(corpus.path or [])
    if not entries:
        raise refuse("corpus.path", corpus.path, "no corpus is given", "for example corpus.path=/data/*.jsonl")
    for entry in entries:
        if "://" in entry:
            raise refuse("corpus.path", entry, "remote paths cannot be read yet", "copy the files to a folder first")
    paths = [os.path.abspath(os.path.expanduser(entry)) for entry in entries]
    for path in paths:
        if not os.path.lexists(path) and not glob.has_magic(path):
            raise refuse("corpus.path", path, "no such file or folder", "check the path on the machine that reads it")
    return paths


def _expand(entry: str, include: list[str], skip_folders: list[str], own: set[str]) -> tuple[str, list[str]]:
    if os.path.isdir(entry):
        return entry, list(_walk(entry, include, skip_folders, own))
    if os.path.lexists(entry):
        return os.path.dirname(entry), [entry]
    parts = entry.split(os.sep)
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = os.sep.join(parts[:fixed]) or os.sep
    named = os.path.join(os.path.realpath(root), "")  # who globs within a folder of ours means it
    inside = tuple(os.path.join(folder, "") for folder in own if not named.startswith(os.path.join(folder, "")))
    found = glob.glob(entry, recursive=True)
    matches = [match for match in found if not os.path.join(os.path.realpath(match), "").startswith(inside)]
    folders = [] if "**" in entry else [match for match in matches if os.path.isdir(match)]
    below = [path for folder in folders for path in _walk(folder, include, skip_folders, own)]
    return root, [match for match in matches if not os.path.isdir(match)] + below


def _walk(folder: str, include: list[str], skip_folders: list[str], own: set[str]) -> Iterator[str]:
    """Files below a folder, hidden and our own ones left out; links to folders are followed, each real folder once."""
    seen = own - {os.path.realpath(folder)}
    for here, folders, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        if os.path.realpath(here) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(here))
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in skip_folders)
        for name in names:
            relative = os.path.relpath(os.path.join(here, name), folder)
            if not name.startswith(".") and _matches(relative, include):
                yield os.path.join(here, name)


def _unreadable(error: OSError) -> None:
    raise refuse(
        "corpus.path", error.filename, f"a folder cannot be read ({error.strerror})", "make it readable, or exclude it"
    ) from error


def _chosen(name: str, corpus: Corpus) -> bool:
    return not _matches(name, corpus.exclude) and (not corpus.include or _matches(name, corpus.include))


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def split_tasks(files: list[dict[str, Any]], task_bytes: int, reader: Any) -> list[dict[str, Any]]:
    """Split a listing into tasks of about `task_bytes`; the same listing gives the same tasks on every machine."""
    tasks: list[list[dict[str, Any]]] = []
    room = 0
    for piece in _pieces(files, task_bytes, reader):
        size = piece["last"] - piece["first"]
        if not tasks or size > room:
            tasks.append([])
            room = task_bytes
        tasks[-1].append(piece)
        room -= size
    return [{"number": number, "pieces": pieces} for number, pieces in enumerate(tasks)]


def _pieces(files: list[dict[str, Any]], task_bytes: int, reader: Any) -> Iterator[dict[str, Any]]:
    for file in files:
        step = task_bytes if reader.splits(file["name"]) else max(file["size"], 1)
        for first in range(0, max(file["size"], 1), step):
            yield {**file, "first": first, "last": min(first + step, file["size"])}
