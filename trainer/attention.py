"""Attention: the formula, and two fast kernels that compute the same numbers.

    Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V        (Vaswani et al., 2017, equation 1)

for every head on its own; causal (a position sees itself and what is before it) and per document (rows are packed with
several documents, and none sees another). Shapes, everywhere in this room:

    R rows   L tokens in a row   H query heads   G key/value heads (H/G queries share one: GQA)   D width of a head
    q [R, L, H, D]   k, v [R, L, G, D]   ->   [R, L, H, D]

    Documents     where the documents of a batch are; made once a forward pass, used by all layers
    formula       the equation, line by line; O(L^2) memory, for reading and for testing the others
    sdpa          PyTorch's scaled_dot_product_attention under a block-diagonal mask
    varlen        no mask: each document is its own sequence (flash kernels on CUDA in bf16 and fp16, a loop elsewhere)
    attend        the one chosen by `model.attention`; `auto` follows `fastest`

The surprise: documents of one length are one call of the loop, and whole rows are the most common length, so even on a
CPU many calls are cheaper than one under a mask, except in rows so short that the mask is nothing.
"""

import functools
import importlib.util
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.schema import Attention


class Documents:
    """Where the documents of a batch of [R, L] tokens are, and the position of each token in its own."""

    def __init__(self, rows: int, row_tokens: int, cu_seqlens: Tensor, position_ids: Tensor | None = None) -> None:
        self.rows, self.row_tokens = rows, row_tokens
        self.cu_seqlens = cu_seqlens
        self.position_ids = position_ids

    @classmethod
    def of(cls, input_ids: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor | None) -> "Documents":
        """The documents of a batch; without `cu_seqlens` every row is one document."""
        rows, row_tokens = input_ids.shape
        if cu_seqlens is None:
            cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=input_ids.device) * row_tokens
        documents = cls(rows, row_tokens, cu_seqlens, position_ids)
        if cu_seqlens.device.type == "cpu":
            documents.check()
        if position_ids is None:
            documents.position_ids = documents.positions()
        return documents

    def check(self) -> None:
        """Refuse boundaries that do not cover the batch, or a document that runs over the end of a row.

        Only done where the boundaries are on the CPU: elsewhere looking at them would stop the device.
        """
        ends = set(self.cu_seqlens.tolist())
        wanted = range(0, self.rows * self.row_tokens + 1, self.row_tokens)
        if not ends.issuperset(wanted) or max(ends) != wanted[-1] or min(ends) != 0 or min(self.lengths) < 1:
            raise ValueError(
                f"cu_seqlens must rise from 0 to {wanted[-1]} and contain every multiple of {self.row_tokens}, "
                f"the start of each of the {self.rows} rows; it has {len(ends)} boundaries"
            )

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document; on a GPU this waits for the device, so only the loop asks for it."""
        return torch.diff(self.cu_seqlens).tolist()

    @functools.cached_property
    def numbers(self) -> Tensor:
        """[R, L]: which document each token belongs to."""
        places = torch.arange(self.rows * self.row_tokens, dtype=torch.int32, device=self.cu_seqlens.device)
        number = torch.searchsorted(self.cu_seqlens.contiguous(), places, right=True) - 1
        return number.view(self.rows, self.row_tokens)

    def positions(self) -> Tensor:
        """[R, L]: position of each token in its document, from 0."""
        places = torch.arange(self.rows * self.row_tokens, device=self.cu_seqlens.device).view_as(self.numbers)
        return places - self.cu_seqlens.long()[self.numbers]

    @functools.cached_property
    def mask(self) -> Tensor:
        """[R, 1, L, L]: whether the token of the third axis sees the token of the fourth."""
        same = self.numbers[:, :, None] == self.numbers[:, None, :]
        return same.tril()[:, None]


def formula(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Attention exactly as the equation has it."""
    d_k = q.shape[-1]
    shared_by = q.shape[2] // k.shape[2]
    k = k.repeat_interleave(shared_by, dim=2)  # each key/value head serves a group of neighbouring query heads
    v = v.repeat_interleave(shared_by, dim=2)
    scores = torch.einsum("rqhd,rkhd->rhqk", q, k) / math.sqrt(d_k)
    scores = scores.masked_fill(~documents.mask, -math.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return torch.einsum("rhqk,rkhd->rqhd", weights, v)


def sdpa(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """One fused call for the whole batch, with the block-diagonal mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=documents.mask, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Each document as its own sequence, so that no mask is ever made."""
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))  # [R*L, heads, D]
    if varlen_kernel(q) is None:
        return varlen_loop(flat_q, flat_k, flat_v, documents.lengths).view(q.shape)
    return varlen_cuda(flat_q, flat_k, flat_v, documents).view(q.shape)


def varlen_loop(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Causal attention over the documents of [T, heads, D], those of one length together in one call."""
    if len(set(lengths)) == 1:  # no copy: the batch is already [documents, length]
        shaped = [x.view(len(lengths), lengths[0], *x.shape[1:]) for x in (q, k, v)]
        return causal(*shaped).flatten(0, 1)
    pieces = list(zip(*(torch.split(x, lengths) for x in (q, k, v)), strict=True))
    of_length: dict[int, list[int]] = {}
    for document, length in enumerate(lengths):
        of_length.setdefault(length, []).append(document)
    outputs: dict[int, Tensor] = {}
    for members in of_length.values():
        stacked = [torch.stack([pieces[i][part] for i in members]) for part in range(3)]
        outputs.update(zip(members, causal(*stacked).unbind(), strict=True))
    return torch.cat([outputs[i] for i in range(len(lengths))])


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of [documents, length, heads, D], one document per entry."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def varlen_kernel(q: Tensor) -> str | None:
    """Which variable-length kernel takes `q`: `flash_attn`, `torch`, or None (not CUDA, not 16 bit, none installed)."""
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] > 256:
        return None
    return installed_kernel()


@functools.cache
def installed_kernel() -> str | None:
    """The variable-length kernel this installation has, found without loading it."""
    if importlib.util.find_spec("flash_attn") is not None:
        return "flash_attn"
    return "torch" if importlib.util.find_spec("torch.nn.attention.varlen") is not None else None


def varlen_cuda(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """The flash kernels, which take the boundaries as they are; a row's length bounds its documents' lengths."""
    ends, longest = documents.cu_seqlens.to(torch.int32), documents.row_tokens
    if installed_kernel() == "flash_attn":
        from flash_attn import flash_attn_varlen_func  # noqa: PLC0415 (only where it is installed)

        out: Tensor = flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True)
        return out
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 (newer torch only)

    gqa = q.shape[1] != k.shape[1]
    mixed = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=gqa)  # (-1, 0): causal
    assert isinstance(mixed, Tensor)
    return mixed


def fastest(q: Tensor) -> Attention:
    """Which kernel `auto` means: a flash kernel where one takes `q`, else by device and row length.

    On a CPU (one thread, forward and backward, documents of 3 to 2,000 tokens on average) the loop took against the
    mask 0.9 to 3.3 times the time in rows of 32 to 128 tokens, 0.5 to 1.0 at 256, 0.1 to 0.8 at 1,024 and 2,048.
    """
    if q.device.type != "cpu":
        return Attention.varlen if varlen_kernel(q) else Attention.sdpa
    return Attention.varlen if q.shape[1] >= 256 else Attention.sdpa


KERNELS = {Attention.formula: formula, Attention.sdpa: sdpa, Attention.varlen: varlen}


def attend(kind: Attention, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Attention by the kernel that `model.attention` names."""
    if kind is Attention.auto:
        kind = fastest(q)
    return KERNELS[kind](q, k, v, documents)
