"""The tokenizer stage: deterministic, loadable by others, honest about bytes, and not to be altered."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from conf.schema import Corpus, Data, Paths, Run, Tokenizer
from data_pipeline import stages, tokenizer
from data_pipeline.manifest import Manifest

pytestmark = pytest.mark.unit

TEXTS = [f"def f{i}(x):\n    return x + {i * i}  # größer, 漢字 🙂\n" * (1 + i % 5) for i in range(300)]


def make_run(folder: Path, **keys: Any) -> Run:
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))
    corpus = Corpus(reader="jsonl", path=str(folder / "a.jsonl"))
    paths = Paths(store=str(folder / "store"))
    return Run(paths=paths, corpus=corpus, tokenizer=Tokenizer(**{"vocab_size": 400, **keys}), data=Data())


def make(run: Run) -> tuple[str, Manifest]:
    manifests: list[Manifest] = []
    for build in stages.plan(run)[:2]:
        work = build(*manifests)
        for task in work.tasks():
            stages.run_task(work.spec(), task)
        manifests.append(work.finish())
    return work.folder, manifests[-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[str, Manifest]:
    return make(make_run(tmp_path_factory.mktemp("trained")))


def test_every_text_comes_back_and_its_bytes_add_up(trained):
    folder, made = trained
    encoder = tokenizer.load(folder)
    sizes = tokenizer.load_token_bytes(folder)
    assert (encoder.bos_id, encoder.eos_id, encoder.pad_id) == (0, 1, 2)
    assert made.counts["vocab_size"] == encoder.vocab_size == len(sizes) == 400
    assert not sizes[:3].any()
    for text in [
        *TEXTS[:9],
        "",
        " ",
        "\0\r\n\t",
        "<|eos|>",
        "a<|bos|>b<|pad|>",
        "🙂" * 50,
        "".join(map(chr, range(1, 2000))),
    ]:
        ids = encoder.encode(text)
        assert ids[0] == 0 and ids[-1] == 1
        assert not {0, 1, 2} & set(ids[1:-1]), "text must not be able to spell a special token"
        assert encoder.tokenizer.decode(ids[1:-1]) == text
        assert sizes[ids].sum() == len(text.encode())


def test_training_gives_the_same_bytes_in_another_process_with_another_number_of_threads(trained, tmp_path):
    _, made = trained
    make_run(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); import test_tokenizer as t; from pathlib import Path;"
        "print(t.make(t.make_run(Path(sys.argv[1])))[1].content_sha256)"
    )
    env = {**os.environ, "RAYON_NUM_THREADS": "3", "PYTHONHASHSEED": "5"}
    command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == made.content_sha256


def test_auto_tokenizer_loads_the_folder(trained):
    from transformers import AutoTokenizer

    folder, _ = trained
    theirs, ours = AutoTokenizer.from_pretrained(folder), tokenizer.load(folder)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    for text in TEXTS[:20]:
        assert theirs.encode(text) == ours.encode(text)[1:-1]
        assert theirs.decode(theirs.encode(text)) == text


def test_the_sample_is_bounded_and_leaves_out_what_is_held_out(tmp_path):
    run = make_run(tmp_path, sample_bytes=4000)
    run.data.heldout_fraction = 0.3
    read = stages.documents_work(run)
    stages.run_task(read.spec(), read.tasks()[0])
    work = stages.tokenizer_work(run, read.finish())
    texts = list(tokenizer.sample(work.spec(), work.tasks()[0]["documents_tasks"]))
    assert 2000 < sum(len(t.encode()) for t in texts) <= 4000
    heldout = {d.text for d in _kept(work) if d.heldout}
    assert heldout and not heldout & set(texts)


def _kept(work: stages.StageWork) -> Any:
    from data_pipeline import documents

    return documents.kept(work.spec(), work.tasks()[0]["documents_tasks"][0])


def test_an_altered_tokenizer_is_refused(tmp_path):
    folder, _ = make(make_run(tmp_path))
    path = Path(folder) / "tokenizer.json"
    path.write_text(path.read_text().replace("ByteLevel", "ByteLevel ", 1))
    with pytest.raises(ValueError, match=r"tokenizer\.json: altered"):
        tokenizer.load(folder)


def foreign(path: Path, specials: list[str]) -> Path:
    """A tokenizer.json of somebody else: GPT-2's kind, wrapping texts in its own specials."""
    theirs = tokenizer.train(iter(TEXTS), 350)
    shape = json.loads(theirs.to_str())
    shape["added_tokens"] = []
    for name in (tokenizer.BOS, tokenizer.EOS, tokenizer.PAD):
        del shape["model"]["vocab"][name]
    theirs = tokenizers.Tokenizer.from_str(json.dumps(shape))
    theirs.add_special_tokens(specials)
    if specials:
        pair = (specials[0], theirs.token_to_id(specials[0]))
        theirs.post_processor = tokenizers.processors.TemplateProcessing(f"{specials[0]} $A", special_tokens=[pair])
    theirs.save(str(path))
    return path


@pytest.mark.parametrize(("specials", "same"), [(["<|endoftext|>"], True), (["<s>", "</s>"], False), ([], False)])
def test_an_imported_tokenizer_gets_what_it_lacks(tmp_path, specials, same):
    path = foreign(tmp_path / "tokenizer.json", specials)
    folder, made = make(make_run(tmp_path, path=str(tmp_path)))
    encoder, sizes = tokenizer.load(folder), tokenizer.load_token_bytes(folder)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    for text in TEXTS[:9]:
        ids = encoder.encode(text)
        assert ids[1:-1] == theirs.encode(text, add_special_tokens=False).ids
        assert (ids[0], ids[-1]) == (encoder.bos_id, encoder.eos_id)
        assert sizes[ids].sum() == len(text.encode())
    assert (encoder.bos_id == encoder.eos_id) is same
    assert encoder.tokenizer.encode("a").ids == theirs.encode("a", add_special_tokens=False).ids
    assert made.counts["vocab_size"] == len(sizes)


def test_a_sentencepiece_kind_counts_bytes_and_others_are_refused(tmp_path):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3, "\u2581the": 4, "\u2581": 5, "é": 6}
    model = tokenizers.models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>")
    sizes = tokenizer.token_bytes(tokenizers.Tokenizer(model))
    assert np.array_equal(sizes[3:], [1, 4, 1, 2])
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab={"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="not byte-level"):
        tokenizer.import_tokenizer(str(tmp_path / "tokenizer.json"))


def test_a_missing_or_broken_import_is_refused_with_the_key(tmp_path):
    run = make_run(tmp_path, path=str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.path=.*none\.json"):
        make(run)
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.path=.*none\.json"):
        make(run)
