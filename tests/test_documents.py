"""Readers, filters and the documents stage: every document has one fate, whatever the input is like."""

import base64
import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from conf.registry import FILTERS
from conf.schema import Corpus, Data, Paths, Run
from data_pipeline import documents, stages
from data_pipeline.corpus import list_corpus
from data_pipeline.manifest import Manifest

pytestmark = pytest.mark.unit


def make_run(tmp_path: Path, corpus: dict[str, Any], **data: Any) -> Run:
    return Run(paths=Paths(store=str(tmp_path / "store")), corpus=Corpus(**corpus), data=Data(**data))


def prepare(run: Run) -> tuple[stages.StageWork, Manifest]:
    work = stages.documents_work(run)
    for task in work.tasks():
        stages.run_task(work.spec(), task)
    return work, work.finish()


def rows(work: stages.StageWork) -> list[dict[str, Any]]:
    tables = (pq.read_table(f"{work.folder}/{documents.index_name(t['number'])}") for t in work.tasks())
    return [row for table in tables for row in table.to_pylist()]


def quarantined(work: stages.StageWork) -> list[dict[str, Any]]:
    files = sorted(Path(work.folder).glob("quarantine/*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_bad_files_are_counted_kept_aside_and_the_others_go_on(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "good.txt").write_bytes("grüße\r\nline\n".encode())
    (raw / "zipped.txt.gz").write_bytes(gzip.compress(b"zipped text"))
    (raw / "latin1.txt").write_bytes(b"caf\xe9 " * 30_000)
    (raw / "nul.txt").write_bytes(b"a\0b")
    (raw / "empty.txt").write_bytes(b"")
    (raw / "big.txt").write_bytes(b"x" * 200_001)
    (raw / "bomb.txt.gz").write_bytes(gzip.compress(b"y" * 5_000_000))
    (raw / "cut.txt.gz").write_bytes(gzip.compress(os.urandom(1000))[:-20])
    (raw / "gone.txt").symlink_to(raw / "nowhere")
    os.mkfifo(raw / "pipe.txt")
    (tmp_path / "raw" / b"na\xffme.txt".decode(errors="surrogateescape")).write_bytes(b"fine text, odd name")
    work, made = prepare(make_run(tmp_path, {"path": str(raw)}, max_document_bytes=200_000))
    assert made.accounting == {
        "read": 11,
        "kept": 2,
        "filtered": {},
        "duplicates": {},
        "quarantined": {
            "bad_gzip": 1,
            "empty": 1,
            "file_name_not_utf8": 1,
            "not_a_file": 1,
            "not_utf8": 1,
            "nul": 1,
            "oversize": 2,
            "unreadable": 1,
        },
    }
    kept = {row["file"]: row for row in rows(work)}
    assert set(kept) == {"good.txt", "zipped.txt.gz"}
    text = "grüße\r\nline\n".encode()
    assert kept["good.txt"]["sha256"] == hashlib.sha256(text).digest()[:16]
    assert (kept["good.txt"]["text_bytes"], kept["good.txt"]["chars"]) == (len(text), len(text.decode()))
    aside = {q["path"]: q for q in quarantined(work)}
    latin = aside["latin1.txt"]
    assert latin["sha256"] == hashlib.sha256((raw / "latin1.txt").read_bytes()).hexdigest()
    assert latin["length"] == 150_000
    assert base64.b64decode(latin["head_base64"]) == (b"caf\xe9 " * 30_000)[: 64 * 1024]
    assert "na\\xffme.txt" in aside


LINES = [
    (b'{"text": "one", "n": 7}', None),
    (b'{"text": "two", "n": 8', "bad_json"),
    (b'{"body": "three"}', "missing_key"),
    (b'{"text": 4}', "not_text"),
    (b"", "empty"),
    (b'{"text": "\xff"}', "not_utf8"),
    (b'{"text": "nul \\u0000"}', "nul"),
    (b'{"text": "\\ud800"}', "lone_surrogate"),
    (b"[1, 2]", "not_an_object"),
    (b"[" * 100_000, "bad_json"),
    (b'{"text": "' + b"z" * 300_000 + b'"}', "oversize"),
    (b'{"text": ""}', "empty"),
    (b'{"text": "last, without a newline"}', None),
]


@pytest.mark.parametrize("task_bytes", [1, 7, 1000, 100_000, 10_000_000])
def test_jsonl_lines_have_one_fate_however_the_file_is_split(tmp_path, task_bytes):
    data = b"\n".join(line for line, _ in LINES)
    small = [(line, reason) for line, reason in LINES if len(line) < 1000]
    if task_bytes < 1000:  # thousands of tasks would show nothing more
        data = b"\n".join(line for line, _ in small)
    (tmp_path / "a.jsonl").write_bytes(data)
    run = make_run(
        tmp_path,
        {"reader": "jsonl", "path": str(tmp_path / "a.jsonl"), "id_key": "n"},
        task_bytes=task_bytes,
        max_document_bytes=200_000,
    )
    work = stages.documents_work(run)
    assert len(work.tasks()) == -(-len(data) // task_bytes)
    reader_records = [r for t in work.tasks() for r in documents.records(str(tmp_path), work.spec()["config"], t)]
    expected = small if task_bytes < 1000 else LINES
    assert [getattr(r, "reason", None) for r in reader_records] == [reason for _, reason in expected]
    offset = 0
    for record, (line, _) in zip(reader_records, expected, strict=True):
        assert (record.offset, record.length) == (offset, len(data[offset : offset + len(line) + 1]))
        offset += len(line) + 1
    assert getattr(reader_records[0], "id", None) == "7"


def test_a_gzip_cut_short_keeps_the_lines_before_the_cut(tmp_path):
    lines = b"".join(json.dumps({"text": os.urandom(30).hex()}).encode() + b"\n" for _ in range(2000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-5000])
    _, made = prepare(make_run(tmp_path, {"reader": "jsonl", "path": str(tmp_path)}))
    assert made.accounting["kept"] > 1500
    assert made.accounting["quarantined"] == {"bad_gzip": 1}


def test_python_source_is_decoded_by_its_coding_line(tmp_path):
    (tmp_path / "old.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'café'\n".encode("latin-1"))
    (tmp_path / "__init__.py").write_bytes(b"")
    (tmp_path / "wrong.py").write_bytes(b"name = '\xe9'\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("x = 1")
    work, made = prepare(make_run(tmp_path, {"reader": "python_stdlib", "path": str(tmp_path)}))
    assert (made.accounting["read"], made.accounting["quarantined"]) == (2, {"not_utf8": 1})
    [row] = rows(work)
    assert row["text_bytes"] == len("# -*- coding: latin-1 -*-\nname = 'café'\n".encode())


def test_the_running_interpreter_is_a_corpus(tmp_path):
    work = stages.documents_work(make_run(tmp_path, {"reader": "python_stdlib", "exclude": ["test/*"]}))
    names = [piece["name"] for task in work.tasks() for piece in task["pieces"]]
    assert {"json/decoder.py", "pydoc_data/topics.py"} <= set(names)
    assert not [n for n in names if n.startswith("test/") or "site-packages" in n]
    assert work.describe().startswith("documents: ")


def test_filters_give_verdicts_and_the_first_reason_is_counted(tmp_path):
    for name, text in {"a": "x", "b": "word " * 50, "c": "two words\n", "d": "some more words here"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    chosen = {"min_words": {"limit": 3}, "min_chars": {"limit": 5}, "max_chars": {"limit": 100}}
    work, made = prepare(make_run(tmp_path, {"path": str(tmp_path / "*.txt")}, filters=chosen))
    assert made.accounting["filtered"] == {"too_few_words": 2, "too_long": 1}
    assert made.accounting["kept"] == 1
    first = rows(work)[0]
    assert (first["filter/min_words"], first["filter/min_chars"]) == ("too_few_words", "too_short")


@pytest.mark.parametrize(
    ("corpus", "data", "said"),
    [
        ({"path": "{tmp}/nowhere"}, {}, "corpus.path"),
        ({"path": "{tmp}/*.nothing"}, {}, "no files found"),
        ({"path": "{tmp}/void"}, {}, "no files found"),
        ({}, {}, "no corpus is given"),
        ({"path": "s3://bucket/x"}, {}, "remote"),
        ({"path": "{tmp}", "reader": "jsnol"}, {}, "did you mean 'jsonl'"),
        ({"path": "{tmp}"}, {"filters": {"min_char": {}}}, "did you mean 'min_chars'"),
        ({"path": "{tmp}"}, {"filters": {"min_chars": {"limt": 1}}}, "limt"),
    ],
)
def test_what_cannot_start_is_refused_before_anything_is_written(tmp_path, corpus, data, said):
    (tmp_path / "void").mkdir()
    (tmp_path / "a.txt").write_text("text")
    filled = {k: v.replace("{tmp}", str(tmp_path)) for k, v in corpus.items()}
    with pytest.raises(ValueError, match=said):
        stages.documents_work(make_run(tmp_path, filled, **data))
    assert not (tmp_path / "store").exists()


def test_a_failing_filter_names_itself_and_the_file(tmp_path):
    @FILTERS.register("always_fails")
    def always_fails(text: str) -> str | None:
        raise KeyError("oh")

    (tmp_path / "a.txt").write_text("text")
    run = make_run(tmp_path, {"path": str(tmp_path / "a.txt")}, filters={"always_fails": {}})
    with pytest.raises(ValueError, match=r"data.filters.always_fails.*a\.txt.*KeyError"):
        prepare(run)


def test_held_out_is_a_property_of_the_text_alone(tmp_path):
    texts = [f"document number {i}" for i in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in reversed(texts[:200])))
    chosen = []
    for name, task_bytes in (("a", 10_000_000), ("b", 100)):
        corpus = {"reader": "jsonl", "path": str(tmp_path / f"{name}.jsonl")}
        work, _ = prepare(make_run(tmp_path, corpus, heldout_fraction=0.1, task_bytes=task_bytes))
        chosen.append({row["sha256"]: row["heldout"] for row in rows(work)})
    assert all(chosen[0][digest] == heldout for digest, heldout in chosen[1].items())
    assert 20 < sum(chosen[0].values()) < 65


def test_links_are_followed_once_and_a_file_named_twice_is_read_once(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("text")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "corpus" / "loop").symlink_to(tmp_path / "corpus")
    path = [str(tmp_path / "corpus"), str(tmp_path / "corpus" / "link" / "a.txt")]
    work = stages.documents_work(make_run(tmp_path, {"path": path}))
    assert [p["name"] for t in work.tasks() for p in t["pieces"]] == ["link/a.txt"]


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("*", ["in/b.txt", "in/deep/c.txt", "out.txt"]),
        ("**/*.txt", ["in/b.txt", "in/deep/c.txt", "out.txt"]),
        ("i*", ["in/b.txt", "in/deep/c.txt"]),
        ("in/b.txt", ["b.txt"]),
        ("in", ["b.txt", "deep/c.txt"]),
    ],
)
def test_globs_and_folders(tmp_path, path, found):
    (tmp_path / "corpus" / "in" / "deep").mkdir(parents=True)
    for name in ("out.txt", "in/b.txt", "in/deep/c.txt", "in/.hidden"):
        (tmp_path / "corpus" / name).write_text("text")
    work = stages.documents_work(make_run(tmp_path, {"path": str(tmp_path / "corpus" / path)}))
    assert [p["name"] for t in work.tasks() for p in t["pieces"]] == found


def test_a_file_that_changes_after_listing_is_an_error_that_names_it(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    work = stages.documents_work(make_run(tmp_path, {"path": str(tmp_path / "a.txt")}))
    (tmp_path / "a.txt").write_text("afterwards")
    with pytest.raises(ValueError, match=r"a\.txt: changed since"):
        stages.run_task(work.spec(), work.tasks()[0])


@pytest.mark.parametrize("path", [".", "*", "**"])
def test_what_we_write_ourselves_is_not_a_document(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "sub/b.txt", "runs/one/ledger.jsonl", "store/tokens/x/train-00000.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("some text of a document")
    (tmp_path / "again").symlink_to(tmp_path / "store")
    listing = list_corpus(Corpus(path=path, include=["*"]), ("runs", "store"))
    assert [f["name"] for f in listing.files] == ["a.txt", "sub/b.txt"]
    inside = list_corpus(Corpus(path="store/tokens", include=["*"]), ("runs", "store"))
    assert [f["name"] for f in inside.files] == ["x/train-00000.tar"], "named on purpose"
