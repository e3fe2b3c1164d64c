"""The chunked loss equals the full one, and never holds what the full one holds."""

import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.loss import IGNORE, token_loss_sum

pytestmark = pytest.mark.unit
torch.set_num_threads(1)  # tiny tensors: a second thread only waits


def problem(tokens: int, width: int, vocab: int, dtype: torch.dtype = torch.float32):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=draw).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=draw) * 0.3).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=draw)
    labels[::7] = IGNORE
    return hidden, weight, labels


def full_loss(hidden, weight, labels, chunk_tokens=None):
    return F.cross_entropy((hidden @ weight.t()).float(), labels, ignore_index=IGNORE, reduction="sum")


class Memory(TorchDispatchMode):
    """The largest tensor and the most bytes that were alive at once among what operations made."""

    def __init__(self):
        super().__init__()
        self.largest_bytes = self.alive_bytes = self.peak_bytes = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in before:
                self.made(tensor.untyped_storage())
        return result

    def made(self, storage):
        size = storage.nbytes()
        self.alive_bytes += size
        self.largest_bytes = max(self.largest_bytes, size)
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes)
        weakref.finalize(storage, self.freed, size)

    def freed(self, size):
        self.alive_bytes -= size


def measured(loss, *args):
    with Memory() as memory:
        loss(*args).backward()
    return memory


@pytest.mark.parametrize("chunk_tokens", [1, 16, 100, 1000])
def test_value_and_gradients_equal_the_full_loss(chunk_tokens):
    ours, truth = problem(100, 24, 500), problem(100, 24, 500)
    num_labels = int((ours[2] != IGNORE).sum())
    loss, expected = token_loss_sum(*ours, chunk_tokens) / num_labels, full_loss(*truth) / num_labels
    assert abs(loss.item() - expected.item()) <= 1e-6
    loss.backward()
    expected.backward()
    for a, b in zip(ours[:2], truth[:2], strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-6


def test_gradients_are_the_slopes_in_double_precision():
    hidden, weight, labels = problem(9, 4, 6, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: token_loss_sum(h, w, labels, 4) * 1.7, (hidden, weight))


def test_rows_keep_their_shape_and_only_wanted_gradients_are_made():
    hidden, weight, labels = problem(12, 4, 6)
    frozen = weight.detach()
    token_loss_sum(hidden.view(3, 4, 4), frozen, labels.view(3, 4), 5).backward()
    assert hidden.grad.shape == (12, 4)
    with torch.no_grad():
        assert token_loss_sum(hidden, weight, labels, 5).item() == pytest.approx(
            full_loss(hidden, weight, labels).item()
        )


def test_memory_is_bounded_by_the_chunk():
    tokens, width, vocab, chunk = 1024, 16, 4000, 64
    all_logits, chunk_logits = 4 * tokens * vocab, 4 * chunk * vocab
    memory = measured(token_loss_sum, *problem(tokens, width, vocab), chunk)
    assert memory.largest_bytes == chunk_logits
    # one buffer of logits, the two kept gradients, and as much again for what is added to them or handed on
    assert memory.peak_bytes < 1.1 * chunk_logits + 3 * 4 * width * (vocab + tokens)
    assert memory.peak_bytes < all_logits / 6


def test_the_measurement_sees_all_logits_where_they_are_made():
    tokens, width, vocab = 1024, 16, 4000
    memory = measured(full_loss, *problem(tokens, width, vocab))
    assert memory.largest_bytes >= 4 * tokens * vocab
    assert memory.peak_bytes >= 2 * 4 * tokens * vocab


@pytest.mark.parametrize("chunk_tokens", [5, 100])
def test_without_any_label_the_loss_is_zero_and_so_are_the_gradients(chunk_tokens):
    hidden, weight, labels = problem(20, 4, 6)
    loss = token_loss_sum(hidden, weight, torch.full_like(labels, IGNORE), chunk_tokens)
    loss.backward()
    assert loss.item() == 0.0
    assert not hidden.grad.any() and not weight.grad.any()


def test_extreme_logits_stay_finite():
    hidden, weight, labels = problem(20, 4, 6)
    with torch.no_grad():
        hidden *= 1e4
    loss = token_loss_sum(hidden, weight, labels, 8)
    loss.backward()
    assert loss.item() == pytest.approx(full_loss(hidden, weight, labels).item(), rel=1e-5)
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_bf16_sums_in_fp32():
    """The sum of 4,000 losses near 5 in bf16 would be off by 60; gradients keep the parameters' type."""
    hidden, weight, labels = problem(4000, 8, 200, torch.bfloat16)
    loss = token_loss_sum(hidden, weight, labels, 128)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(full_loss(hidden, weight, labels).item(), rel=1e-5)
    loss.backward()
    assert weight.grad.dtype == torch.bfloat16 and hidden.grad.dtype == torch.bfloat16
    wide = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    full_loss(*wide, labels).backward()
    error = (weight.grad.float() - wide[1].grad).norm() / wide[1].grad.norm()
    assert error < 0.01


def test_autocast_trains_fp32_weights():
    hidden, weight, labels = problem(50, 8, 60)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = token_loss_sum(hidden, weight, labels, 16)
    loss.backward()
    assert loss.dtype == weight.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(full_loss(hidden, weight, labels).item(), rel=0.01)
