"""The `tokenizer` stage: a byte-level BPE trained on the kept text, or an imported `tokenizer.json`.

    run(spec, task)   -> tokenizer.json, tokenizer_config.json (AutoTokenizer loads the folder), token_bytes.npy
    load(folder)      -> Encoder(encode, bos_id, eos_id, pad_id, vocab_size), refused when the file was altered

A document is encoded as [bos, tokens of its text, eos]. The file itself adds no special tokens: AutoTokenizer's
`encode(text)` gives the text's ids alone. `token_bytes[id]` is the number of bytes of text the id stands for, special
tokens 0; sums of it turn losses into bits per byte. The sample is chosen by the hashes of the documents' texts.

The surprise: text that spells `<|eos|>` must become ordinary tokens, or a corpus could end documents at will; so
`encode_special_tokens` is set (its name means: encode them as plain text).
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers

from conf.refusal import BadRequest, refuse
from data_pipeline import documents, manifest

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
KNOWN_BOS = (BOS, "<|begin_of_text|>", "<s>", "<bos>", "<|endoftext|>")
KNOWN_EOS = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>")
KNOWN_PAD = (PAD, "<pad>", "<|finetune_right_pad_id|>")


@dataclass(slots=True)
class Encoder:
    """Text to the token ids of a document."""

    tokenizer: Any
    bos_id: int
    eos_id: int
    pad_id: int
    vocab_size: int
    sha256: str

    def encode(self, text: str) -> list[int]:
        """The ids of a whole document: bos, its text, eos."""
        ids: list[int] = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return [self.bos_id, *ids, self.eos_id]


def import_path(path: str) -> str:
    """The tokenizer.json a `tokenizer.path` means; raises ValueError when there is none."""
    found = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
    if not os.path.isfile(found):
        raise refuse("tokenizer.path", path, "no tokenizer.json there", "name a tokenizer.json or its folder")
    return os.path.abspath(found)


def sample(spec: dict[str, Any], tasks: list[dict[str, Any]]) -> Iterator[str]:
    """The kept train documents whose hash falls below the sampled fraction, at most `sample_bytes` of text."""
    left = spec["config"]["sample_bytes"]
    fraction = min(1.0, left / max(spec["train_bytes"], 1))
    for task in tasks:
        for document in documents.kept(spec, task):
            place = int.from_bytes(document.digest[8:16], "big") / 2**64
            if not document.heldout and place < fraction and document.text_bytes <= left:
                left -= document.text_bytes
                yield document.text


def train(texts: Iterator[str], vocab_size: int) -> Any:
    """Train a byte-level BPE; every byte is in the vocabulary, so nothing is ever unknown."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def import_tokenizer(path: str) -> Any:
    """Load a tokenizer.json and give it bos, eos and pad where it has none; whatever wraps the text is removed."""
    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library raises bare Exception for a bad file
        raise refuse("tokenizer.path", path, f"not a tokenizer.json ({error})", "name a Hugging Face one") from error
    shape = json.loads(tokenizer.to_str())
    if "ByteLevel" not in json.dumps([shape["pre_tokenizer"], shape["decoder"]]) and not _has_byte_fallback(shape):
        raise refuse(
            "tokenizer.path", path, "not byte-level, so bits per byte cannot be told", "use a byte-level tokenizer"
        )
    return tokenizer


def caution(path: str) -> str:
    """What to know of an imported tokenizer that does not spell the very bytes of a text; empty for one that does."""
    shape = json.loads(import_tokenizer(path).to_str())
    changes = [shape["normalizer"]["type"]] if shape["normalizer"] else []
    if '"add_prefix_space": true' in json.dumps(shape["pre_tokenizer"]):
        changes.append("add_prefix_space")
    return f"; it changes texts ({', '.join(changes)}), so bits per byte are near, not exact" if changes else ""


def _has_byte_fallback(shape: dict[str, Any]) -> bool:
    return bool(shape["model"].get("byte_fallback"))


def special_names(tokenizer: Any) -> tuple[str, str, str]:
    """The names of bos, eos and pad, adding to the tokenizer those that it has under no known name."""
    names = []
    for ours, known in ((BOS, KNOWN_BOS), (EOS, KNOWN_EOS), (PAD, KNOWN_PAD)):
        name = next((n for n in known if tokenizer.token_to_id(n) is not None), ours)
        tokenizer.add_special_tokens([name])
        names.append(name)
    return names[0], names[1], names[2]


def token_bytes(tokenizer: Any) -> np.ndarray:
    """Bytes of text each id stands for, int32; special tokens 0."""
    shape = json.loads(tokenizer.to_str())
    byte_level = not _has_byte_fallback(shape)
    added = {t["id"]: 0 if t["special"] else len(t["content"].encode()) for t in shape["added_tokens"]}
    sizes = np.zeros(max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1, np.int32)
    for piece, number in tokenizer.get_vocab(with_added_tokens=True).items():
        sizes[number] = added[number] if number in added else _piece_bytes(piece, byte_level)
    return sizes


def _piece_bytes(piece: str, byte_level: bool) -> int:
    if byte_level:  # one character of the piece per byte of text
        return len(piece)
    if len(piece) == 6 and piece.startswith("<0x"):
        return 1
    return len(piece.replace("\u2581", " ").encode())


def run(spec: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """Train or import the tokenizer and write its folder; returns the task's result."""
    config, folder = spec["config"], spec["folder"]
    if spec["path"]:
        tokenizer = import_tokenizer(spec["path"])
    else:
        tokenizer = train(sample(spec, task["documents_tasks"]), config["vocab_size"])
    bos, eos, pad = special_names(tokenizer)
    if config["path_sha256"]:
        tokenizer.post_processor = None
        tokenizer.no_truncation()
        tokenizer.no_padding()
    sizes = token_bytes(tokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,
    }
    array = io.BytesIO()
    np.save(array, sizes, allow_pickle=False)
    files = [
        manifest.write_output(folder, "tokenizer.json", tokenizer.to_str(pretty=True).encode()),
        manifest.write_output(folder, "tokenizer_config.json", (json.dumps(settings, indent=2) + "\n").encode()),
        manifest.write_output(folder, "token_bytes.npy", array.getvalue()),
    ]
    ids = {f"{kind}_id": tokenizer.token_to_id(name) for kind, name in (("bos", bos), ("eos", eos), ("pad", pad))}
    return {"files": files, "counts": {"vocab_size": len(sizes), **ids}}


def reduce(spec: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    """The outputs of the one task, and the hash by which everything made with this tokenizer names it."""
    files, counts = results[0]["files"], results[0]["counts"]
    return {"files": files, "counts": counts, "tokenizer_sha256": files[0]["sha256"]}


def load(folder: str) -> Encoder:
    """Open a finished tokenizer folder; raises ValueError when tokenizer.json is not the one that was committed."""
    made = manifest.Manifest.load(folder)
    path = f"{folder}/tokenizer.json"
    with open(path, "rb") as file:
        data = file.read()
    if hashlib.sha256(data).hexdigest() != made.tokenizer_sha256:
        raise BadRequest(f"{path}: altered since it was made (its SHA-256 is not the manifest's)\nrestore it")
    tokenizer = tokenizers.Tokenizer.from_str(data.decode())
    tokenizer.encode_special_tokens = True
    counts = made.counts
    return Encoder(
        tokenizer=tokenizer,
        bos_id=counts["bos_id"],
        eos_id=counts["eos_id"],
        pad_id=counts["pad_id"],
        vocab_size=counts["vocab_size"],
        sha256=made.tokenizer_sha256,
    )


def load_token_bytes(folder: str) -> np.ndarray:
    """Bytes of text per token id of a finished tokenizer folder."""
    return np.asarray(np.load(f"{folder}/token_bytes.npy", allow_pickle=False))
