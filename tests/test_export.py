"""The exported folder as Transformers loads it, as we read it back, and what a kill leaves of it."""

import json
import os

import pytest
import torch
from exported import TEXT, run_of, states, trained, write_tokenizer
from torch import nn

from conf.registry import MODELS
from trainer.decoder import Decoder
from trainer.export import export_hf, load_export, special_ids
from trainer.models import build_model

pytestmark = pytest.mark.unit
torch.set_num_threads(1)  # tiny tensors: a second thread only waits


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("made") / "tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def out(tmp_path) -> str:
    return str(tmp_path / "export")


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_the_export_with_equal_logits(tied, tokenizer_folder, out):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = run_of(tied_embeddings=tied, rope_theta=50000.0)
    model = trained(run)
    export_hf(run.model, 280, states(model), tokenizer_folder, out)
    theirs, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert not any(loading.values()), loading
    tokenizer = AutoTokenizer.from_pretrained(out)
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (theirs.config.bos_token_id, theirs.config.eos_token_id, theirs.config.pad_token_id) == (0, 1, 2)
    assert theirs.generation_config.eos_token_id == 1
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == TEXT
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (model(ids) - expected).abs().max() <= 1e-5
        assert (load_export(out)(ids) - expected).abs().max() <= 1e-5


def test_reading_back_gives_the_same_bytes(tokenizer_folder, out):
    run = run_of()
    model = trained(run)
    export_hf(run.model, 280, states(model), tokenizer_folder, out)
    back = load_export(out)
    assert isinstance(back, Decoder) and not back.training
    assert back.lm_head.weight is back.model.embed_tokens.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name])
    assert sorted(os.listdir(out)) == sorted(
        [
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "zeroray.json",
        ]
    )


def test_the_model_card_says_what_the_run_was(tokenizer_folder, out):
    run = run_of()
    model = trained(run)
    export_hf(run.model, 280, states(model), tokenizer_folder, out, run_info={"held-out bits per byte": 2.5})
    with open(f"{out}/README.md") as file:
        card = file.read()
    assert "held-out bits per byte: 2.5" in card and "AutoModelForCausalLM" in card
    assert f"parameters: {sum(p.numel() for p in model.parameters()):,}" in card


def test_everything_is_durable_before_it_has_its_name(tokenizer_folder, out, monkeypatch):
    synced, real_sync, real_rename = set(), os.fsync, os.rename

    def fsync(fd):
        synced.add(os.stat(fd).st_ino)
        real_sync(fd)

    def rename(source, target):
        if target == out:
            inodes = {os.stat(os.path.join(source, n)).st_ino for n in [*os.listdir(source), "."]}
            assert len(inodes) == 8 and inodes <= synced
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    run = run_of()
    export_hf(run.model, 280, states(trained(run)), tokenizer_folder, out)
    assert os.stat(os.path.dirname(out)).st_ino in synced


def test_a_newer_export_takes_the_place_of_the_older(tokenizer_folder, out):
    run = run_of()
    model = build_model(run, 280)
    export_hf(run.model, 280, states(model), tokenizer_folder, out)
    export_hf(run.model, 280, states(trained(run)), tokenizer_folder, out)
    assert torch.equal(load_export(out).model.norm.weight, trained(run).model.norm.weight)
    assert os.listdir(os.path.dirname(out)) == ["export"]


def test_a_failed_export_leaves_the_older_one(tokenizer_folder, out, monkeypatch):
    run = run_of()
    state = states(trained(run))
    export_hf(run.model, 280, state, tokenizer_folder, out)
    monkeypatch.setattr(
        "trainer.export.write_tensors", lambda path, tensors: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(OSError, match="full"):
        export_hf(run.model, 280, state, tokenizer_folder, out)
    assert os.listdir(os.path.dirname(out)) == ["export"]
    load_export(out)


def test_what_a_kill_between_the_renames_left_is_put_back(tokenizer_folder, out):
    run = run_of()
    state = states(trained(run))
    export_hf(run.model, 280, state, tokenizer_folder, out)
    os.rename(out, f"{out}.old-0123456789ab")
    os.makedirs(f"{out}.tmp-0123456789ab/half")
    with pytest.raises(ValueError, match=r"model\.norm\.weight is missing"):
        export_hf(run.model, 280, {k: v for k, v in state.items() if k != "model.norm.weight"}, tokenizer_folder, out)
    assert os.listdir(os.path.dirname(out)) == ["export"]
    load_export(out)


def test_weights_of_another_shape_are_refused_by_name(tokenizer_folder, out):
    run = run_of()
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is \[280, 32\], not \[281, 32\]"):
        export_hf(run.model, 281, states(trained(run)), tokenizer_folder, out)
    assert not os.path.exists(out)


def test_a_foreign_llama_in_several_files_is_read(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=50,
        rope_parameters={"rope_type": "default", "rope_theta": 777.0},
    )
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = load_export(str(tmp_path))
    assert ours.config.rope_theta == 777.0 and ours.config.norm_eps == config.rms_norm_eps
    ids = torch.arange(40)[None] % 90
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() <= 1e-5


def change(folder: str, name: str, **values) -> None:
    with open(f"{folder}/{name}") as file:
        config = json.load(file)
    with open(f"{folder}/{name}", "w") as file:
        json.dump({**config, **values}, file)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"model_type": "qwen3"}, "model_type=qwen3"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_type=llama3"),
        ({"head_dim": 16}, "head_dim=16"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(changed, reason, tokenizer_folder, out):
    run = run_of()
    export_hf(run.model, 280, states(trained(run)), tokenizer_folder, out)
    os.unlink(f"{out}/zeroray.json")
    load_export(out)
    change(out, "config.json", **changed)
    with pytest.raises(ValueError, match=reason):
        load_export(out)


def test_missing_and_damaged_folders_are_named(tokenizer_folder, out):
    with pytest.raises(ValueError, match="no exported model"):
        load_export(out)
    run = run_of()
    export_hf(run.model, 280, states(trained(run)), tokenizer_folder, out)
    os.truncate(f"{out}/model.safetensors", 5000)
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        load_export(out)
    os.unlink(f"{out}/model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: no such file"):
        load_export(out)
    change(out, "zeroray.json", version=2)
    with pytest.raises(ValueError, match="version 2"):
        load_export(out)


def test_a_weight_index_cannot_leave_the_folder(tokenizer_folder, out):
    run = run_of()
    export_hf(run.model, 280, states(trained(run)), tokenizer_folder, out)
    with open(f"{out}/model.safetensors.index.json", "w") as file:
        json.dump({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}, file)
    with pytest.raises(ValueError, match="outside the folder"):
        load_export(out)


class Plain(nn.Module):
    """A model of another package that says nothing about Transformers; one of its tensors is a buffer."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, config.width)
        self.out = nn.Linear(config.width, vocab_size)
        self.register_buffer("shift", torch.zeros(vocab_size))

    def forward(self, input_ids, labels=None, position_ids=None, cu_seqlens=None):
        return self.out(self.embed(input_ids)) + self.shift


class Convertible(Decoder):
    """One that says how it is a Llama: here, with doubled norms halved."""

    def to_hugging_face(self, state):
        from trainer.export import llama_config

        halved = {n: t / 2 if n.endswith("norm.weight") else t for n, t in state.items()}
        return llama_config(self.config, self.vocab_size), halved


def test_a_plugin_model_without_a_conversion_is_ours_to_read(monkeypatch, tokenizer_folder, out):
    monkeypatch.setitem(MODELS._ours, "plain", Plain)
    run = run_of(name="plain")
    model = build_model(run, 280)
    state = {**states(model), "shift": torch.arange(280.0)}
    export_hf(run.model, 280, state, tokenizer_folder, out)
    assert not os.path.exists(f"{out}/config.json")
    with open(f"{out}/README.md") as file:
        assert "Transformers cannot load this model" in file.read()
    back = load_export(out)
    assert torch.equal(back.embed.weight, model.embed.weight) and torch.equal(back.shift, torch.arange(280.0))


def test_a_plugin_model_with_a_conversion_is_transformers_to_read(monkeypatch, tokenizer_folder, out):
    from transformers import AutoModelForCausalLM

    monkeypatch.setitem(MODELS._ours, "convertible", Convertible)
    run = run_of(name="convertible", tied_embeddings=False)
    model = trained(run)
    export_hf(run.model, 280, states(model), tokenizer_folder, out)
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(theirs.model.norm.weight * 2, model.model.norm.weight)


def test_special_ids_are_those_the_tokenizer_names(tokenizer_folder, tmp_path):
    assert special_ids(tokenizer_folder) == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    copy = str(tmp_path / "copy")
    write_tokenizer(copy)
    change(copy, "tokenizer_config.json", eos_token={"content": "<|bos|>"}, pad_token=None)
    assert special_ids(copy) == {"bos_token_id": 0, "eos_token_id": 0}
    change(copy, "tokenizer_config.json", eos_token="<|nowhere|>")
    with pytest.raises(ValueError, match="names no eos_token"):
        special_ids(copy)
