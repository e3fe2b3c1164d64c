"""Generating: greedy against Transformers, drawing by seed, ends, and what a prompt is."""

import pytest
import torch
from exported import TEXT, run_of, states, trained, write_tokenizer
from torch import nn

from trainer.export import export_hf
from trainer.generate import generate, generate_ids, next_token, sample_texts

pytestmark = pytest.mark.unit
torch.set_num_threads(1)  # tiny tensors: a second thread only waits


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("generate")
    write_tokenizer(str(folder / "tokenizer"))
    run = run_of()
    export_hf(run.model, 280, states(trained(run)), str(folder / "tokenizer"), str(folder / "export"))
    return str(folder / "export")


class Counter(nn.Module):
    """Always says the next number, and after 5 that the text ends (id 0)."""

    def __init__(self):
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))
        self.read = []

    def forward(self, input_ids, labels=None, position_ids=None, cu_seqlens=None):
        self.read.append(input_ids.tolist()[0])
        following = torch.where(input_ids >= 5, 0, input_ids + 1)
        return nn.functional.one_hot(following, 10) * 100.0


def test_greedy_equals_transformers(export):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(TEXT[:20])]])
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert generate(export, [TEXT[:20]], 12, temperature=0) == [expected]


def test_texts_depend_on_seed_and_prompt_alone(export):
    prompts = ["def ", "return"]
    first = generate(export, prompts, 10, temperature=1.0, seed=3)
    assert generate(export, prompts, 10, temperature=1.0, seed=3) == first
    assert generate(export, prompts[1:], 10, temperature=1.0, seed=3) == first[1:]
    assert generate(export, prompts, 10, temperature=1.0, seed=4) != first
    greedy = generate(export, prompts, 10, temperature=0)
    assert generate(export, prompts, 10, temperature=1.0, seed=3, top_k=1) == greedy
    assert greedy == generate(export, prompts, 10, temperature=0, seed=5)


def test_a_text_ends_before_eos():
    assert generate_ids(Counter(), [2], 20, temperature=0, seed=0, eos_id=0) == [3, 4, 5]
    assert generate_ids(Counter(), [2], 2, temperature=0, seed=0, eos_id=0) == [3, 4]
    assert generate_ids(Counter(), [2], 5, temperature=0, seed=0) == [3, 4, 5, 0, 1]
    assert generate_ids(Counter(), [2], 0, temperature=0, seed=0) == []


def test_only_as_much_is_read_as_the_model_has_positions():
    model = Counter()
    model.config = type("Config", (), {"max_positions": 3})
    assert generate_ids(model, [5, 1, 1, 1], 3, temperature=0, seed=0) == [2, 3, 4]
    assert model.read == [[1, 1, 1], [1, 1, 2], [1, 2, 3]]


def test_the_exported_model_goes_on_beyond_its_positions(export):
    assert isinstance(generate(export, [TEXT * 3], 3, temperature=0)[0], str)


def test_a_prompt_begins_with_bos_and_cannot_name_special_tokens(export, monkeypatch):
    seen = []
    monkeypatch.setattr("trainer.generate.generate_ids", lambda model, ids, *a, **k: seen.append(ids) or [])
    assert generate(export, ["", "<|eos|>"], 5) == ["", ""]
    assert seen[0] == [0]
    assert seen[1][0] == 0 and len(seen[1]) > 2 and 1 not in seen[1]


def test_a_character_of_several_tokens_is_whole(export, monkeypatch):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{export}/tokenizer.json")
    one_by_one = tokenizer.encode("語").ids
    assert len(one_by_one) == 3
    monkeypatch.setattr("trainer.generate.generate_ids", lambda *a, **k: one_by_one)
    assert generate(export, ["x"], 3) == ["語"]


def test_probabilities_are_those_of_the_temperature():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draw = torch.Generator().manual_seed(0)
    for temperature, top_k in ((1.0, None), (0.5, None), (2.0, 2)):
        drawn = torch.tensor([next_token(logits, temperature, top_k, draw) for _ in range(4000)])
        found = torch.bincount(drawn, minlength=4) / 4000
        kept = logits if top_k is None else torch.tensor([2.0, 1.0, -torch.inf, -torch.inf])
        torch.testing.assert_close(found, torch.softmax(kept / temperature, 0), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [({"max_new_tokens": -1}, "max_new_tokens"), ({"temperature": -0.1}, "temperature"), ({"top_k": 0}, "top_k")],
)
def test_amounts_that_cannot_be_are_refused(export, wrong, name):
    with pytest.raises(ValueError, match=name):
        generate(export, ["a"], **{"max_new_tokens": 1, **wrong})


def test_samples_are_prompts_and_texts(export):
    samples = sample_texts(export, ["def "], 5, seed=1)
    assert samples == [{"prompt": "def ", "text": generate(export, ["def "], 5, seed=1)[0]}]
    assert [s["prompt"] for s in sample_texts(export, [], 2, seed=1)] == [""]
