"""The decoder against Transformers' Llama with the same weights, packed documents, and where its weights come from."""

import hashlib
import itertools
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conf.registry import MODELS, OBJECTIVES
from conf.schema import Attention, Model, Run, Train
from trainer.decoder import Decoder, RMSNorm, rotate, rotation
from trainer.initial import initialize, normal
from trainer.models import bare_model, build_model, count_parameters, flops_per_token

pytestmark = pytest.mark.unit
torch.set_num_threads(1)  # tiny tensors: a second thread only waits

VOCAB = 97
SHAPES = {
    "gqa_tied": {"heads": 4, "kv_heads": 2, "tied_embeddings": True},
    "mha_untied": {"heads": 4, "kv_heads": 4, "tied_embeddings": False},
    "mqa_untied": {"heads": 2, "kv_heads": 1, "tied_embeddings": False, "rope_theta": 500000.0, "norm_eps": 1e-6},
}
KINDS = [Attention.formula, Attention.sdpa, Attention.varlen]
PACKED = {2: [0, 5, 6, 12, 24, 31, 36, 48], 3: [0, 24, 25, 48, 50, 60, 72]}  # rows of 24 tokens


def run_of(**model) -> Run:
    shape = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "max_positions": 300}
    return Run(model=Model(**{**shape, **model}))


def batch(rows: int, row_tokens: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, row_tokens + 1), generator=draw)
    labels = ids[:, 1:].clone()
    labels[:, ::5] = -100
    return ids[:, :-1].contiguous(), labels


def llama(model: Decoder):
    """Transformers' Llama with copied weights; its config is written out here, not taken from our export."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=c.width,
        intermediate_size=c.ffn_width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        max_position_embeddings=c.max_positions,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tied_embeddings,
        attn_implementation="eager",
    )
    theirs = LlamaForCausalLM(config)
    theirs.load_state_dict(model.state_dict())
    return theirs


def scrambled(model: nn.Module) -> nn.Module:
    """Weights far from their start, so that norms, scales and attention all matter."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", list(SHAPES))
def test_logits_and_gradients_equal_transformers_llama(shape, kind):
    ours = scrambled(build_model(run_of(attention=kind, **SHAPES[shape]), VOCAB))
    theirs = llama(ours)
    ids, labels = batch(2)
    expected = theirs(input_ids=ids, use_cache=False).logits
    assert (ours(ids) - expected).abs().max() <= 1e-5
    count = int((labels != -100).sum())
    (ours(ids, labels) / count).backward()
    F.cross_entropy(expected.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
    gradients = dict(theirs.named_parameters())
    compared = [(name, p.grad, gradients[name].grad) for name, p in ours.named_parameters()]
    assert len(compared) == len(gradients) and all(g.abs().max() > 1e-4 for _, _, g in compared)
    worst = {name: (a - b).abs().max().item() for name, a, b in compared}
    assert max(worst.values()) <= 1e-5, worst


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [2, 3])
def test_a_packed_document_is_as_if_alone(rows, kind):
    model = scrambled(build_model(run_of(attention=kind, **SHAPES["gqa_tied"]), VOCAB))
    ids, labels = batch(rows)
    ends = PACKED[rows]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    position_ids = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(ends)]).view(rows, 24)
    logits = model(ids, position_ids=position_ids, cu_seqlens=cu_seqlens)
    loss = model(ids, labels, position_ids, cu_seqlens)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    alone_loss = torch.zeros(())
    for first, end in itertools.pairwise(ends):
        piece, wanted = ids.flatten()[None, first:end], labels.flatten()[None, first:end]
        alone = model(piece)
        assert (logits.flatten(0, 1)[first:end] - alone[0]).abs().max() <= 1e-5
        alone_loss = alone_loss + model(piece, wanted)
    assert loss.item() == pytest.approx(alone_loss.item(), rel=1e-6)
    for together, apart in zip(gradients, torch.autograd.grad(alone_loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


def test_packed_rows_equal_transformers_with_the_same_positions():
    model = scrambled(build_model(run_of(attention=Attention.varlen, **SHAPES["gqa_tied"]), VOCAB))
    theirs = llama(model)
    theirs.set_attn_implementation("sdpa")
    ends = PACKED[2]
    position_ids = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(ends)]).view(2, 24)
    ids, _ = batch(2)
    expected = theirs(input_ids=ids, position_ids=position_ids, use_cache=False).logits
    # positions are made from cu_seqlens where they are not given
    assert (model(ids, cu_seqlens=torch.tensor(ends)) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_no_document_hears_of_another(kind):
    model = build_model(run_of(attention=kind, **SHAPES["gqa_tied"]), VOCAB)
    ids, _ = batch(2)
    cu_seqlens = torch.tensor([0, 10, 24, 48])
    before = model(ids, cu_seqlens=cu_seqlens)
    ids[0, 3] = (ids[0, 3] + 1) % VOCAB
    changed = (model(ids, cu_seqlens=cu_seqlens) - before).abs().amax(-1)
    assert not changed[0, :3].any() and changed[0, 3:10].all()
    assert not changed[0, 10:].any() and not changed[1].any()


def test_chunks_do_not_change_the_loss():
    model = build_model(run_of(**SHAPES["gqa_tied"]), VOCAB)
    ids, labels = batch(3)
    found = []
    for model.loss_chunk_tokens in (1, 10, 2048):
        loss = model(ids, labels) / (labels != -100).sum()
        found.append((loss.item(), torch.autograd.grad(loss, list(model.parameters()))))
    full = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=-100)
    expected = torch.autograd.grad(full, list(model.parameters()))
    for value, gradients in found:
        assert abs(value - full.item()) <= 1e-6
        assert max((a - b).abs().max().item() for a, b in zip(gradients, expected, strict=True)) <= 1e-6


def test_a_batch_without_labels_gives_zero_and_finite_gradients():
    model = build_model(run_of(), VOCAB)
    ids, labels = batch(2)
    loss = model(ids, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bf16_weights_compute_positions_and_norms_in_fp32():
    model = build_model(run_of(), VOCAB)
    ids, labels = batch(2, 280)
    expected = model(ids, labels).item()
    model.bfloat16()
    loss = model(ids, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=2e-3)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    cos, _ = rotation(torch.tensor([[256, 257]]), 8, 10000.0)
    assert cos.dtype == torch.float32 and cos[0, 1, 0, 0].item() == pytest.approx(math.cos(257), abs=1e-5)


def test_rotation_depends_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).unbind()

    def score(at: int, back: int) -> float:
        turned = [rotate(x, rotation(torch.tensor([[p]]), 16, 10000.0)) for x, p in ((q, at), (k, at - back))]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(200, 4), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_only_parameters_are_state():
    model = build_model(run_of(tied_embeddings=False), VOCAB)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert not list(model.buffers())


def digest(model: nn.Module) -> str:
    tensors = sorted((n, p.detach().numpy().tobytes()) for n, p in model.named_parameters())
    return hashlib.sha256(b"".join(n.encode() + data for n, data in tensors)).hexdigest()


def test_initial_weights_are_the_same_bytes_in_any_order_and_process():
    first = digest(build_model(run_of(), VOCAB))
    torch.manual_seed(99)
    backwards = bare_model(run_of().model, VOCAB)
    parameters = dict(backwards.named_parameters())
    backwards.named_parameters = lambda: reversed(list(parameters.items()))  # another order of drawing
    initialize(backwards, 0)
    del backwards.named_parameters
    assert digest(backwards) == first
    program = (
        "import sys, torch; sys.path.insert(0, 'tests'); torch.set_num_threads(2); torch.manual_seed(int(sys.argv[1]));"
        "from test_decoder import *; print(digest(build_model(run_of(), VOCAB)))"
    )
    done = subprocess.run([sys.executable, "-c", program, "7"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == first


def test_initial_weights_depend_on_the_seed_and_have_the_right_size():
    run, other = run_of(tied_embeddings=False), run_of(tied_embeddings=False)
    other.run.seed = 1
    model = build_model(run, VOCAB)
    weights = dict(model.named_parameters())
    for name, parameter in build_model(other, VOCAB).named_parameters():
        assert (parameter == weights[name]).all() == ("norm" in name)
    assert (weights["model.norm.weight"] == 1).all()
    assert weights["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert weights["model.layers.1.mlp.down_proj.weight"].std().item() == pytest.approx(0.01, rel=0.05)
    assert weights["model.layers.0.self_attn.o_proj.weight"].std().item() == pytest.approx(0.01, rel=0.1)
    assert normal(0, "a", (3,)).tolist() == [-0.6780126690864563, -0.7582534551620483, 0.9064565300941467]


def test_parameters_are_counted_once():
    config = run_of().model
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    tied = 2 * layer + 32 + VOCAB * 32
    assert count_parameters(bare_model(config, VOCAB)) == tied
    assert flops_per_token(config, VOCAB, 24) == 6 * tied + 12 * 2 * 32 * 24
    config.tied_embeddings = False
    assert count_parameters(bare_model(config, VOCAB)) == tied + VOCAB * 32
    assert flops_per_token(config, VOCAB, 24) == 6 * tied + 12 * 2 * 32 * 24  # looking up costs nothing


class OnlyForward(nn.Module):
    """A model of another package: the protocol's forward and nothing else."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.scale = nn.Parameter(torch.rand(config.width))
        self.out = nn.Linear(config.width, vocab_size)

    def forward(self, input_ids, labels=None, position_ids=None, cu_seqlens=None):
        logits = self.out(self.norm(self.embed(input_ids)) * self.scale)
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


@pytest.fixture
def plugin(monkeypatch):
    monkeypatch.setitem(MODELS._ours, "only_forward", OnlyForward)
    return run_of(name="only_forward")


def test_a_model_with_only_the_forward_is_built_and_trained(plugin):
    plugin.train = Train(loss_chunk_tokens=7)
    torch.manual_seed(3)
    model = build_model(plugin, VOCAB)
    torch.manual_seed(4)
    assert digest(build_model(plugin, VOCAB)) == digest(model)  # also the vector that only the model itself sets
    assert model.config is plugin.model and model.vocab_size == VOCAB and model.loss_chunk_tokens == 7
    assert (model.norm.weight == 1).all() and (model.out.bias == 0).all() and (model.scale > 0).any()
    assert model.out.weight.std().item() == pytest.approx(0.02, rel=0.1)
    ids, labels = batch(2)
    loss = OBJECTIVES.get("causal_lm")(model, {"input_ids": ids, "labels": labels}, {})
    assert loss.item() == pytest.approx(math.log(VOCAB) * int((labels != -100).sum()), rel=0.05)


def test_building_leaves_the_process_random_state_alone():
    before = torch.random.get_rng_state()
    build_model(run_of(), VOCAB)
    assert (torch.random.get_rng_state() == before).all()


def test_what_is_not_a_model_is_refused(monkeypatch):
    monkeypatch.setitem(MODELS._ours, "broken", lambda config, vocab_size: "nothing")
    with pytest.raises(ValueError, match=r"model\.name=broken: its builder returned str"):
        build_model(run_of(name="broken"), VOCAB)
    with pytest.raises(ValueError, match="did you mean 'decoder'"):
        build_model(run_of(name="decodr"), VOCAB)


def test_options_that_would_be_ignored_are_refused():
    with pytest.raises(ValueError, match=r"objective\.options"):
        OBJECTIVES.get("causal_lm")(None, {}, {"smoothing": 0.1})


def test_the_norm_of_bf16_is_computed_in_fp32():
    x = (torch.randn(4, 4096, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    expected = torch.nn.functional.rms_norm(x.double(), (4096,), eps=1e-5)
    found = RMSNorm(4096, 1e-5).bfloat16()(x)
    assert found.dtype == torch.bfloat16
    assert ((found.double() - expected).abs() / expected.abs()).max() <= 2**-8  # one rounding, at the end
