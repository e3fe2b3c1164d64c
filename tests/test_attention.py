"""Attention against a hand-written reference: loops over positions in plain numpy, sharing nothing with the kernels."""

import itertools
import sys
import types

import numpy as np
import pytest
import torch

from conf.schema import Attention
from trainer.attention import KERNELS, Documents, attend, fastest, installed_kernel, varlen_cuda, varlen_loop

pytestmark = pytest.mark.unit
torch.set_num_threads(1)  # tiny tensors: a second thread only waits

ROWS, ROW_TOKENS, WIDTH = 2, 7, 4
PACKED = [0, 3, 4, 7, 9, 14]


def by_hand(q: np.ndarray, k: np.ndarray, v: np.ndarray, cu_seqlens: list[int]) -> np.ndarray:
    """Attention of one token after the other, one head after the other."""
    rows, row_tokens, heads, width = q.shape
    shared_by = heads // k.shape[2]
    q, k, v = (x.reshape(rows * row_tokens, *x.shape[2:]) for x in (q, k, v))
    out = np.zeros_like(q)
    for first, end in itertools.pairwise(cu_seqlens):
        for here in range(first, end):
            for head in range(heads):
                scores = [q[here, head] @ k[j, head // shared_by] / width**0.5 for j in range(first, here + 1)]
                weights = np.exp(np.array(scores) - max(scores))
                weights /= weights.sum()
                for j, weight in zip(range(first, here + 1), weights, strict=True):
                    out[here, head] += weight * v[j, head // shared_by]
    return out.reshape(rows, row_tokens, heads, width)


def inputs(heads: int, kv_heads: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(ROWS, ROW_TOKENS, n, WIDTH) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def documents(cu_seqlens: list[int]) -> Documents:
    ids = torch.zeros(ROWS, ROW_TOKENS, dtype=torch.int64)
    return Documents.of(ids, None, torch.tensor(cu_seqlens, dtype=torch.int32))


@pytest.mark.parametrize("kind", list(Attention))
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("cu_seqlens", [[0, 7, 14], PACKED, list(range(15))])
def test_forward_equals_the_loop_over_positions(kind, heads, kv_heads, cu_seqlens):
    q, k, v = inputs(heads, kv_heads)
    out = attend(kind, q, k, v, documents(cu_seqlens))
    expected = by_hand(q.detach().numpy(), k.detach().numpy(), v.detach().numpy(), cu_seqlens)
    np.testing.assert_allclose(out.detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("kind", list(KERNELS))
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_gradients_equal_the_slopes_of_the_loop_over_positions(kind, heads, kv_heads):
    tensors = inputs(heads, kv_heads)
    out = attend(kind, *tensors, documents(PACKED))
    rng = np.random.default_rng(1)
    weights = rng.standard_normal(out.shape)
    (out * torch.from_numpy(weights)).sum().backward()
    values = [t.detach().numpy() for t in tensors]
    for _ in range(4):
        step = [rng.standard_normal(x.shape) * 1e-5 for x in values]
        ahead, behind = (
            (by_hand(*[x + sign * s for x, s in zip(values, step, strict=True)], PACKED) * weights).sum()
            for sign in (1, -1)
        )
        slope = sum(float((t.grad.numpy() * s).sum()) for t, s in zip(tensors, step, strict=True))
        assert slope == pytest.approx((ahead - behind) / 2, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("kind", [Attention.sdpa, Attention.varlen])
def test_fp32_kernels_follow_the_formula_with_gradients(kind):
    ours, truth = inputs(4, 2, torch.float32), inputs(4, 2, torch.float32)
    out, expected = (attend(n, *t, documents(PACKED)) for n, t in ((kind, ours), (Attention.formula, truth)))
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    out.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=5e-6, rtol=0)


@pytest.mark.parametrize("kind", list(KERNELS))
def test_bf16_stays_bf16_and_near(kind):
    wide, narrow = inputs(4, 2, torch.float32), inputs(4, 2, torch.bfloat16)
    out = attend(kind, *narrow, documents(PACKED))
    assert out.dtype == torch.bfloat16
    expected = attend(Attention.formula, *wide, documents(PACKED))
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)


def test_documents_know_their_tokens_and_positions():
    found = documents(PACKED)
    assert found.lengths == [3, 1, 3, 2, 5]
    assert found.numbers.tolist() == [[0, 0, 0, 1, 2, 2, 2], [3, 3, 4, 4, 4, 4, 4]]
    assert found.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("cu_seqlens", [[0, 5, 14], [0, 7], [7, 14], [0, 7, 14, 15], [0, 9, 7, 14], [0, 7, 7, 14]])
def test_boundaries_that_do_not_fit_the_rows_are_refused(cu_seqlens):
    with pytest.raises(ValueError, match="start of each of the 2 rows"):
        documents(cu_seqlens)


def test_documents_of_one_length_share_a_call(monkeypatch):
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "trainer.attention.F.scaled_dot_product_attention", lambda *a, **k: calls.append(a[0].shape[0]) or real(*a, **k)
    )
    attend(Attention.varlen, *inputs(4, 2), documents(PACKED))
    assert sorted(calls) == [1, 1, 1, 2]  # lengths 1, 2, 5, and the two of 3
    calls.clear()
    attend(Attention.varlen, *inputs(4, 2), documents([0, 7, 14]))
    assert calls == [2]


def test_auto_follows_the_measured_rule_on_a_cpu():
    for row_tokens, kind in ((128, Attention.sdpa), (256, Attention.varlen), (2048, Attention.varlen)):
        assert fastest(torch.zeros(1, row_tokens, 1, 2)) is kind


@pytest.mark.parametrize("package", ["flash_attn", "torch"])
def test_flash_kernels_are_given_the_boundaries(monkeypatch, package):
    """No GPU here: a stand-in with the kernel's own signature checks what it is called with, and computes it."""
    seen = {}

    def flash_attn_varlen_func(q, k, v, *bounds, causal):
        ends_q, ends_k, longest_q, longest_k = bounds
        seen.update(ends=ends_q, same=ends_k is ends_q, longest=min(longest_q, longest_k), causal=causal)
        return varlen_loop(q, k, v, torch.diff(ends_q).tolist())

    def varlen_attn(q, k, v, *bounds, window_size, enable_gqa):
        assert window_size == (-1, 0) and enable_gqa
        return flash_attn_varlen_func(q, k, v, *bounds, causal=True)

    module = types.ModuleType("stand_in")
    module.flash_attn_varlen_func, module.varlen_attn = flash_attn_varlen_func, varlen_attn
    monkeypatch.setitem(sys.modules, "flash_attn" if package == "flash_attn" else "torch.nn.attention.varlen", module)
    monkeypatch.setattr("trainer.attention.installed_kernel", lambda: package)
    q, k, v = inputs(4, 2)
    packed = documents(PACKED)
    out = varlen_cuda(*(x.flatten(0, 1) for x in (q, k, v)), packed).view(q.shape)
    torch.testing.assert_close(out, attend(Attention.formula, q, k, v, packed))
    assert seen["ends"].dtype == torch.int32 and seen["ends"].tolist() == PACKED
    assert seen["same"] and seen["causal"] and seen["longest"] >= max(packed.lengths)


def test_this_torch_has_the_kernel_we_would_call_on_a_gpu():
    if installed_kernel() == "torch":
        import inspect

        from torch.nn.attention.varlen import varlen_attn

        names = list(inspect.signature(varlen_attn).parameters)
        assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
        assert {"window_size", "enable_gqa"} <= set(names)
