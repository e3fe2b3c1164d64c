"""The decoder: a Llama-type transformer, to be read from the bottom up.

    Decoder.forward(input_ids, labels)                     R rows of L tokens
        model   embed_tokens     [R, L] -> [R, L, W]       one vector of width W per token
                layers           x = x + self_attn(norm(x))    tokens read from earlier tokens of their document
                                 x = x + mlp(norm(x))          each token thinks for itself
                norm
        lm_head                  [R, L, W] -> loss sum, or logits [R, L, V] when there are no labels

RMSNorm (Zhang and Sennrich, 2019), rotary positions (Su et al., 2021), SwiGLU (Shazeer, 2020), grouped queries (Ainslie
et al., 2023). Parameters have the names and layouts of Hugging Face's Llama, so that exporting is copying.

Two surprises. The rotary tables are computed in fp32 at each forward and never stored: a buffer would be cast to bf16
with the model, and bf16 cannot tell position 257 from 256. And every parameter is used only inside the forward of the
module that owns it, by which ZeRO-3 knows when to gather it; what is not a tensor goes to submodules by keyword, where
DeepSpeed's hooks do not look.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conf.registry import MODELS
from conf.schema import Attention, Model
from trainer.attention import Documents, attend
from trainer.loss import token_loss_sum

Rotation = tuple[Tensor, Tensor]  # cosines and sines, each [R, L, 1, D/2]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotation(position_ids: Tensor, head_width: int, theta: float) -> Rotation:
    """Cosine and sine of position * theta^(-2i/D) for each pair i of a head's entries, in fp32."""
    pairs = torch.arange(0, head_width, 2, dtype=torch.float32, device=position_ids.device)
    angles = position_ids[:, :, None, None].float() * (1.0 / theta ** (pairs / head_width))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn the pairs (entry i, entry i + D/2) of each head by their token's angles."""
    cos, sin = by
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class SelfAttention(nn.Module):
    """Queries, keys and values from x, attention, and the way back to width W."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.kind: Attention = config.attention
        self.head_width = config.width // config.heads
        self.q_proj = nn.Linear(config.width, config.heads * self.head_width, bias=False)
        self.k_proj = nn.Linear(config.width, config.kv_heads * self.head_width, bias=False)
        self.v_proj = nn.Linear(config.width, config.kv_heads * self.head_width, bias=False)
        self.o_proj = nn.Linear(config.heads * self.head_width, config.width, bias=False)

    def forward(self, x: Tensor, *, documents: Documents, by: Rotation) -> Tensor:
        """Mix each token with the earlier tokens of its document."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_width)) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = attend(self.kind, rotate(q, by), rotate(k, by), v, documents)
        out: Tensor = self.o_proj(mixed.flatten(2))
        return out


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.ffn_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.ffn_width, bias=False)
        self.down_proj = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Each token on its own."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Attention, then feed-forward, each reading a normalized x and adding to it."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, *, documents: Documents, by: Rotation) -> Tensor:
        """[R, L, W] to [R, L, W]."""
        x = x + self.self_attn(self.input_layernorm(x), documents=documents, by=by)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Body(nn.Module):
    """Everything up to the last hidden states."""

    def __init__(self, config: Model, vocab_size: int) -> None:
        super().__init__()
        self.head_width, self.theta = config.width // config.heads, config.rope_theta
        self.embed_tokens = nn.Embedding(vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, input_ids: Tensor, *, documents: Documents) -> Tensor:
        """[R, L] token ids to [R, L, W] hidden states."""
        assert documents.position_ids is not None
        by = rotation(documents.position_ids, self.head_width, self.theta)
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, documents=documents, by=by)
        out: Tensor = self.norm(x)
        return out


class Head(nn.Module):
    """From hidden states to logits, or straight to the loss, which is computed here so that ZeRO-3 has the weight."""

    def __init__(self, config: Model, vocab_size: int, tied_to: nn.Embedding | None) -> None:
        super().__init__()
        own = nn.Parameter(torch.empty(vocab_size, config.width)) if tied_to is None else tied_to.weight
        self.weight: Tensor = own

    def forward(self, hidden: Tensor, labels: Tensor | None, *, chunk_tokens: int) -> Tensor:
        """Logits without labels; with them the sum of token losses, never making all logits."""
        if labels is None:
            return hidden @ self.weight.t()
        return token_loss_sum(hidden, self.weight, labels, chunk_tokens)


@MODELS.register("decoder")
class Decoder(nn.Module):
    """The in-tree model; its weights are set by `trainer.initial`, not here."""

    def __init__(self, config: Model, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size, self.loss_chunk_tokens = config, vocab_size, 2048
        self.model = Body(config, vocab_size)
        self.lm_head = Head(config, vocab_size, self.model.embed_tokens if config.tied_embeddings else None)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """The sum of token losses over labels that are not -100, or logits [R, L, V] without labels.

        `cu_seqlens` are the boundaries of the documents in the R*L tokens; without it every row is one document.
        """
        documents = Documents.of(input_ids, position_ids, cu_seqlens)
        hidden = self.model(input_ids, documents=documents)
        out: Tensor = self.lm_head(hidden, labels, chunk_tokens=self.loss_chunk_tokens)
        return out

    def initial_std(self, name: str) -> float:
        """What adds to the residual stream starts smaller, by the number of additions (Radford et al., 2019)."""
        adds = name.endswith(("o_proj.weight", "down_proj.weight"))
        return float(0.02 / (2 * self.config.layers) ** 0.5) if adds else 0.02
