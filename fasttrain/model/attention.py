"""Causal self-attention with its options, and the key-value cache.

Plain causal attention is scaled dot-product attention (SDPA). What a query may see beyond that, a
window or its document alone, is said once, by `visible`. On CUDA FlexAttention compiles it into
its kernel and skips what is hidden (Dong et al. 2024, arXiv:2412.05496); elsewhere, and where
FlexAttention cannot go (dropout, a cache), it is written out as a boolean mask for SDPA.

Legend: B batch, T sequence, D dim, H query heads, G key-value heads, K head_dim, S cached length.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as cached
from typing import Any

import torch
import torch.nn.functional as F
from fasttrain_kernels import RMSNorm, apply_rope
from torch import Tensor, nn

from fasttrain.config import ModelConfig

# FlexAttention is imported where it is used: with torch 2.14 that takes half a second, for sympy.
Mask = Any  # a Tensor, or FlexAttention's BlockMask; of attention that is more than causal


def visible(
    window: int | None, documents: Tensor | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the function (row, head, query, key) → may this query look at this key?

    A query sees ``window`` tokens, itself included, of its own document: ``documents`` (B, T)
    numbers them.
    """

    def may_see(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query
        if window is not None:
            seen = seen & (query - key < window)
        if documents is not None:
            seen = seen & (documents[row, query] == documents[row, key])
        return seen

    return may_see


def attention_mask(
    tokens: Tensor, *, start: int, window: int | None, doc_starts: Tensor | None, flex: bool
) -> Mask | None:
    """Return what ``tokens`` (B, T), after ``start`` cached ones, may see; None: plain causal.

    A boolean mask, (T, start + T) or with documents (B, 1, T, T); or with ``flex`` a block mask for
    FlexAttention. ``doc_starts`` (B, T) is true at the first token of each document. Documents and
    ``flex`` need ``start`` = 0.
    """
    t, device = tokens.shape[1], tokens.device
    windowed = window is not None and window < start + t
    if doc_starts is None and not windowed and (start == 0 or t == 1):
        return None
    documents = None if doc_starts is None else doc_starts.cumsum(1, dtype=torch.int32)
    rule = visible(window if windowed else None, documents)
    if flex:
        from torch.nn.attention.flex_attention import create_block_mask

        rows = None if documents is None else len(documents)
        return _flex(create_block_mask)(rule, rows, None, t, t, device=device)
    query = torch.arange(start, start + t, device=device)[:, None]
    key = torch.arange(start + t, device=device)[None, :]
    row = query
    if documents is not None:
        row = torch.arange(len(documents), device=device)[:, None, None, None]
    return rule(row, row, query, key)


@cached
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _flex(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of FlexAttention compiled: run as it is, it writes out all T·T scores."""
    return function if torch.compiler.is_compiling() else _compiled(function)


def _has_flash(x: Tensor) -> bool:
    """Return whether SDPA takes FlashAttention, its only CUDA kernel that knows grouped queries.

    Without, and with a mask, it would write out all T·T scores.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_properties(x.device).major >= 8


def rope_tables(n_positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary angles, each (n_positions, head_dim // 2) fp32.

    Source: Su et al. 2021, RoFormer (arXiv:2104.09864).
    """
    # fp64 on the CPU: at position 100k an fp32 angle is off by about 0.01 rad.
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(n_positions, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def in_gpu_graph(x: Tensor) -> bool:
    """Return whether x is part of a graph that is compiled for a GPU."""
    return x.is_cuda and torch.compiler.is_compiling()


class _Biased(torch.autograd.Function):
    """Returns y as it is; a bias, which y has in it, gets its gradient, summed in two stages.

    The compiler makes the first stage part of the kernel that writes the gradient of y; of a sum
    over all rows at once it makes another pass. Both are in fp32.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, dy.sum(1, dtype=torch.float32).sum(0)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Map x (B, T, D); for a layer that a generated kernel of a GPU follows, not a product."""
    bias: Tensor | None = layer.bias
    y: Tensor
    if bias is None or type(layer) is not nn.Linear or not in_gpu_graph(x):
        y = layer(x)
    else:
        y = F.linear(x, layer.weight, bias.detach())
        y = _Biased.apply(y, bias)  # type: ignore[no-untyped-call]
    return y


@dataclass
class KVCache:
    """The keys and values that all layers have seen, and of how many tokens."""

    layers: list[Tensor]  # (2, B, G, max_tokens, K) each, filled in place
    max_tokens: int
    length: int = 0
    last_tokens: Tensor | None = None  # (B,), what a table of token pairs continues from


class Attention(nn.Module):
    """Multi-head causal self-attention: grouped queries, QK-norm, RoPE, sliding window, dropout.

    Sources: Vaswani et al. 2017 (arXiv:1706.03762); grouped queries: Ainslie et al. 2023
    (arXiv:2305.13245); QK-norm: Henry et al. 2020 (arXiv:2010.04245), here as in Qwen3 before RoPE;
    sliding window: Beltagy et al. 2020 (arXiv:2004.05150); embeddings mixed into the values: Jordan
    et al. 2024, modded-nanogpt, after Zhou et al. 2024 (arXiv:2410.17897).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads or config.n_heads
        self.head_dim = config.head_dim or config.dim // config.n_heads
        self.dropout = config.dropout
        # One product for q, k and v: one read of the input, one larger matrix product.
        n_rows = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
        self.qkv = nn.Linear(config.dim, n_rows, bias=config.bias)
        self.out = nn.Linear(self.n_heads * self.head_dim, config.dim, bias=config.bias)
        norm = config.qk_norm
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if norm else None
        self.value_mix = nn.Parameter(torch.empty(2)) if config.value_embeddings else None

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: Mask | None,
        cache: Tensor | None = None,
        start: int = 0,
        value: Tensor | None = None,
    ) -> Tensor:
        """Map x (B, T, D) to (B, T, D); with a layer's cache, x also sees ``start`` tokens in it.

        ``rope`` is cos and sin of x's positions, each (T, K/2); ``value`` (B, T, G·K) is mixed into
        the values.
        """
        b, t, _ = x.shape
        sizes = [n * self.head_dim for n in (self.n_heads, self.n_kv_heads, self.n_kv_heads)]
        qkv = linear(self.qkv, x)
        parts = torch.split(qkv, sizes, dim=-1)
        q, k, v = (z.view(b, t, -1, self.head_dim) for z in parts)  # (B, T, H or G, K)
        if self.value_mix is not None and value is not None:
            v = self.value_mix[0] * v + self.value_mix[1] * value.view_as(v)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, k, *rope)
        dropout = self.dropout if self.training else 0.0
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or G, T, K)
        if cache is not None:
            cache[0, :, :, start : start + t] = k
            cache[1, :, :, start : start + t] = v
            k, v = cache[:, :, :, : start + t]
        grouped = self.n_kv_heads != self.n_heads
        if mask is not None and not isinstance(mask, Tensor):
            from torch.nn.attention.flex_attention import flex_attention

            q, k, v = (z.to(qkv.dtype) for z in (q, k, v))  # autocast does not know FlexAttention
            y = _flex(flex_attention)(q, k, v, block_mask=mask, enable_gqa=grouped)
        else:
            if grouped and q.is_cuda and (mask is not None or not _has_flash(qkv)):
                k, v = (z.repeat_interleave(self.n_heads // self.n_kv_heads, 1) for z in (k, v))
                grouped = False
            causal = mask is None and t > 1
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
            )  # (B, H, T, K)
        y = y.transpose(1, 2).reshape(b, t, self.n_heads * self.head_dim)
        return F.dropout(self.out(y), dropout)
