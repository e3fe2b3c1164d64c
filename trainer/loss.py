"""The cross-entropy of a long vocabulary without ever holding all logits.

    hidden [T, W] x weight [V, W]  ->  logits [T, V]  ->  sum of -log softmax(logits)[label]

For 8,192 tokens and 128,000 words the logits alone are 4 GiB, their gradient as much again. `ChunkedLoss` goes through
the tokens in chunks, and computes loss *and* gradients of a chunk while its logits are there, in one buffer that is
overwritten in place:

    logits  ->  exp(logits - max)  ->  softmax  ->  softmax - one-hot(label) = d loss / d logits

so that at any time one chunk's [chunk, V] exists. Nothing is computed again in backward, which only multiplies the
kept gradients by the incoming one.

The surprise: the weight is used in forward only. Under ZeRO-3 it is then gathered, and in backward it need not be.
"""

from typing import Any

import torch
from torch import Tensor

IGNORE = -100


def token_loss_sum(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
    """The sum of token losses over the labels that are not -100, as a scalar of at least fp32.

    `hidden` is [..., W], `labels` has its leading shape, `weight` is [V, W].
    """
    flat = hidden.flatten(0, -2)
    if not torch.is_grad_enabled():  # a Function is told that a Parameter wants a gradient even then
        flat, weight = flat.detach(), weight.detach()
    total: Tensor = ChunkedLoss.apply(flat, weight, labels.flatten(), chunk_tokens)  # type: ignore[no-untyped-call]
    return total


class ChunkedLoss(torch.autograd.Function):
    """Sum of token losses, its gradients computed chunk by chunk in forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
        """Loss of [T, W] hidden states; keeps the gradients that will be asked for."""
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            piece = slice(start, start + chunk_tokens)
            logits = (hidden[piece] @ weight.t()).to(wide)
            loss += loss_and_gradient_(logits, labels[piece])
            gradient = logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[piece] = gradient @ weight
            if grad_weight is not None:
                grad_weight += gradient.t() @ hidden[piece]
            del logits, gradient  # before the next chunk's are made, not after
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss.to(wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """The kept gradients times the incoming one."""
        (grad,) = grads
        hidden, weight = ctx.saved_tensors
        grad_hidden = None if hidden is None else hidden * grad.to(hidden.dtype)
        grad_weight = None if weight is None else (weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


def loss_and_gradient_(logits: Tensor, labels: Tensor) -> Tensor:
    """The summed loss of a chunk in float64; turns `logits` into d loss / d logits in place."""
    real = labels != IGNORE
    wanted = labels.clamp_min(0)[:, None]
    logits -= logits.amax(dim=-1, keepdim=True)
    of_label = logits.gather(1, wanted)[:, 0]
    sums = logits.exp_().sum(dim=-1)
    token_losses = torch.where(real, sums.log() - of_label, 0.0)
    logits *= (real / sums)[:, None]
    logits.scatter_add_(1, wanted, -real.to(logits.dtype)[:, None])
    return token_losses.sum(dtype=torch.float64)
