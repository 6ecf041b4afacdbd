"""Causal self-attention with its options, on scaled dot-product attention, and the key-value cache.

Legend: B batch, T sequence, D dim, H query heads, G key-value heads, K head_dim, S cached length.
"""

import torch
import torch.nn.functional as F
from fasttrain_kernels import RMSNorm, apply_rope
from torch import Tensor, nn

from fasttrain.config import ModelConfig

__all__ = ["Attention", "KVCache", "LayerCache", "rope_tables"]


def rope_tables(n_positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary angles, each (n_positions, head_dim // 2) fp32.

    Source: Su et al. 2021, RoFormer (arXiv:2104.09864).
    """
    # fp64 on the CPU: at position 100k an fp32 angle is off by about 0.01 rad.
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(n_positions, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


class LayerCache:
    """Keys and values that a layer has seen: two buffers (B, G, max_tokens, K), filled in place."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def extend(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Append k and v (B, G, T, K) at ``start``; return all so far, (B, G, start + T, K)."""
        end = start + k.shape[2]
        self.keys[:, :, start:end] = k
        self.values[:, :, start:end] = v
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """The caches of all layers and the number of tokens that they hold."""

    def __init__(self, layers: list[LayerCache], max_tokens: int) -> None:
        self.layers = layers
        self.max_tokens = max_tokens
        self.length = 0
        self.last_tokens: Tensor | None = None  # (B,), what a table of token pairs continues from


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
        self.window = config.sliding_window_tokens
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
        mask: Tensor | None,
        cache: LayerCache | None = None,
        start: int = 0,
        value: Tensor | None = None,
    ) -> Tensor:
        """Attend over x (B, T, D) and, with a cache, over the ``start`` tokens before it.

        Args:
            x: normalised hidden states, (B, T, D).
            rope: cos and sin of the positions of x, each (T, K/2), or None.
            mask: boolean (T, start + T), True where a query may look, or None for plain causal.
            cache: keys and values of earlier tokens; x is appended to it.
            start: number of tokens that the cache holds.
            value: embeddings (B, T, G·K) that are mixed into the values, where the config says so.

        Returns:
            (B, T, D).
        """
        b, t, _ = x.shape
        sizes = [n * self.head_dim for n in (self.n_heads, self.n_kv_heads, self.n_kv_heads)]
        q, k, v = self.qkv(x).split(sizes, dim=-1)
        q = q.view(b, t, self.n_heads, self.head_dim)  # (B, T, H, K)
        k = k.view(b, t, self.n_kv_heads, self.head_dim)  # (B, T, G, K)
        v = v.view(b, t, self.n_kv_heads, self.head_dim)
        if self.value_mix is not None and value is not None:
            v = self.value_mix[0] * v + self.value_mix[1] * value.view_as(v)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, k, *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or G, T, K)
        if cache is not None:
            k, v = cache.extend(k, v, start)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and t > 1,
            enable_gqa=self.n_kv_heads != self.n_heads,
        )  # (B, H, T, K)
        y = y.transpose(1, 2).reshape(b, t, self.n_heads * self.head_dim)
        return F.dropout(self.out(y), self.dropout, self.training)
