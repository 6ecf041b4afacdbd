"""The decoder-only Transformer: GPT-2 style and Llama / Qwen3 style are options of one model.

Legend: B batch, T sequence, D dim, F hidden_dim, V vocabulary, L layers.

``model(tokens)`` returns logits (B, T, V). Training takes `Transformer.hidden`, the normalised
hidden states (B, T, D): there the head and the loss are one operation
(`fasttrain_kernels.linear_cross_entropy`), so that logits never exist in full.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fasttrain_kernels import RMSNorm, relu_squared, rms_norm, swiglu
from torch import Tensor, nn

from fasttrain.config import ConfigError, ModelConfig, refuse
from fasttrain.model.attention import (
    Attention,
    KVCache,
    Mask,
    attention_mask,
    in_gpu_graph,
    linear,
    rope_tables,
)


class LayerNorm(nn.LayerNorm):
    """Layer normalization (Ba et al. 2016, arXiv:1607.06450), composed for a compiler on a GPU.

    The backward pass needs x itself. For that of torch's own the forward pass also writes x
    normalised: in gpt2-124m 20 bytes an element, where this moves 12.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the rows of x."""
        if x.dtype not in (torch.float32, torch.bfloat16) or not in_gpu_graph(x):
            return super().forward(x)
        wide = x.float()
        variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
        rstd = torch.rsqrt(variance + self.eps)
        y = (wide * rstd - mean * rstd) * self.weight
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def _norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rms":
        return RMSNorm(config.dim, eps=config.norm_eps)
    if config.norm == "layer":
        return LayerNorm(config.dim, eps=config.norm_eps, bias=config.bias)
    refuse("model.norm", config.norm, "is not implemented; add it to fasttrain.model._norm")


def hidden_dim(config: ModelConfig) -> int:
    """Return the width of the feed-forward layer.

    Unset, it is 4·D, or 8/3·D rounded up to a multiple of 64 for SwiGLU, which has three matrices
    where the others have two (Shazeer 2020, arXiv:2002.05202).
    """
    if config.hidden_dim is not None:
        return config.hidden_dim
    return -(-8 * config.dim // (3 * 64)) * 64 if config.mlp == "swiglu" else 4 * config.dim


def gelu_tanh(x: Tensor) -> Tensor:
    """Apply GELU in its tanh form (Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2)."""
    if x.device.type == "cpu" and torch.compiler.is_compiling():
        # The same function: (1 + tanh u) / 2 = sigmoid(2u). The compiler's vector exp is cheaper
        # than its vector tanh.
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    return F.gelu(x, approximate="tanh")


class FeedForward(nn.Module):
    """Position-wise feed-forward layer: SwiGLU, GELU (tanh form, as GPT-2) or squared ReLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = hidden_dim(config)
        self.kind = config.mlp
        self.dropout = config.dropout
        n_in = 2 if self.kind == "swiglu" else 1  # gate and value side by side: one product
        self.up = nn.Linear(config.dim, n_in * width, bias=config.bias)
        self.down = nn.Linear(width, config.dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, D) to (B, T, D)."""
        h = linear(self.up, x)
        if self.kind == "swiglu":
            gate, value = h.chunk(2, dim=-1)  # (B, T, F) each
            h = swiglu(gate, value)
        elif self.kind == "relu2":
            h = relu_squared(h)
        elif self.kind == "gelu":
            h = gelu_tanh(h)
        else:
            refuse("model.mlp", self.kind, "is not implemented; add it to FeedForward.forward")
        return F.dropout(self.down(h), self.dropout, self.training)


def _rows(x: Tensor) -> Tensor:
    """Return x (B, T, D) as (B·T, D) in a graph for a GPU, elsewhere as it is.

    So products take it, and what a norm writes for them becomes part of the norm's kernel.
    """
    return x.flatten(0, 1) if in_gpu_graph(x) else x


def _unrolled(x: Tensor, shape: torch.Size) -> Tensor:
    return x if x.shape == shape else x.view(shape)


def _add(x: Tensor, branch: Tensor) -> Tensor:
    """Return x + branch in the dtype of x, as rows in a graph for a GPU.

    There a sum in bf16 is written as one in fp32, which rounds to the same: it becomes part of the
    norm that follows. Else the compiler makes it part of the product before, as ``addmm``, which
    first copies x.
    """
    if x.dtype == torch.bfloat16 and in_gpu_graph(x):
        return (x.float() + _rows(branch)).bfloat16()
    return x + _rows(branch)


class Block(nn.Module):
    """Pre-norm residual block: attention, feed-forward (Xiong et al. 2020, arXiv:2002.04745)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = Attention(config)
        self.mlp_norm = _norm(config)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """Map x (B, T, D) to (B, T, D); see `Attention.forward` for the rest."""
        shape = x.shape
        x = _rows(x)
        x = _add(x, self.attention(_unrolled(self.attention_norm(x), shape), *rest))
        return _unrolled(_add(x, self.mlp(_unrolled(self.mlp_norm(x), shape))), shape)


def run_block(block: nn.Module, x: Tensor, *rest: object) -> Tensor:
    """Call a block: what is compiled, where blocks are."""
    y: Tensor = block(x, *rest)
    return y


def run_blocks(
    blocks: Iterable[nn.Module],
    last_norm: nn.Module | None,
    x: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    mask: Mask | None,
    caches: Sequence[Tensor] | None,
    start: int,
    values: Sequence[Tensor] | None,
    run: Callable[..., Tensor] = run_block,
) -> Tensor:
    """Call blocks and the norm behind them; the function that `Transformer.blocks_fn` starts as."""
    for i, block in enumerate(blocks):
        cache = None if caches is None else caches[i]
        value = None if values is None else values[i]
        x = run(block, x, rope, mask, cache, start, value)
    return x if last_norm is None else _unrolled(last_norm(_rows(x)), x.shape)


class Transformer(nn.Module):
    """A decoder-only language model.

    Args:
        config: the ``[model]`` section with ``vocab_size`` set.
        seq_len: the longest sequence, in tokens.

    Raises:
        ConfigError: ``vocab_size`` is unset.
    """

    def __init__(self, config: ModelConfig, *, seq_len: int) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ConfigError("model.vocab_size is unset, and no dataset says it; set it")
        self.config = config
        self.vocab_size = config.vocab_size
        self.seq_len = seq_len
        self.embedding = Embedding(config.vocab_size, config.dim)
        if config.positions not in ("rope", "learned"):
            refuse("model.positions", config.positions, "is not implemented; add it to Transformer")
        learned = config.positions == "learned"
        self.position_embedding = Embedding(seq_len, config.dim) if learned else None
        pairs = config.bigram_vocab_size
        self.bigram_embedding = Embedding(pairs, config.dim) if pairs else None
        self.head_dim = config.head_dim or config.dim // config.n_heads
        n_tables = config.n_layers if config.value_embeddings else 0
        value_dim = (config.n_kv_heads or config.n_heads) * self.head_dim
        tables = (Embedding(config.vocab_size, value_dim) for _ in range(n_tables))
        self.value_embeddings = nn.ModuleList(tables)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = _norm(config)
        # A tied head is the embedding itself, so that a checkpoint holds the matrix once.
        tied = config.tied_embeddings
        self.head = None if tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.blocks_fn: Callable[..., Tensor] = run_blocks
        self.rope_cos: Any  # Tensor; None with learned positions
        self.rope_sin: Any
        self.register_buffer("rope_cos", None, persistent=False)
        self.register_buffer("rope_sin", None, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise all parameters in place, from ``generator`` or torch's global one.

        Matrices are normal with standard deviation ``init_std`` (unset: 1/sqrt(fan-in), LeCun et
        al. 1998). Matrices that write to the residual stream are zero where
        ``zero_init_projections`` (Zhang et al. 2019, arXiv:1901.09321), else scaled by 1/sqrt(2·L)
        (Radford et al. 2019). The head, tied or not, has standard deviation min(0.02, 0.5/sqrt(D)),
        which keeps the first loss within 0.3 of ln V; an untied embedding has 1, of the size of a
        normalised hidden state. Biases and the table of token pairs are zero, norm weights one.
        """
        config = self.config
        if self.position_embedding is None:
            tables = rope_tables(self.seq_len, self.head_dim, config.rope_theta)
            self.rope_cos, self.rope_sin = (t.to(self.embedding.weight.device) for t in tables)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = config.init_std or module.in_features**-0.5
                nn.init.normal_(module.weight, std=std, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | RMSNorm):
                module.reset_parameters()
        for block in self.blocks:
            assert isinstance(block, Block)
            if block.attention.value_mix is not None:
                block.attention.value_mix.copy_(torch.tensor([1.0, 0.5]))
            for projection in (block.attention.out.weight, block.mlp.down.weight):
                scale = 0.0 if config.zero_init_projections else (2 * config.n_layers) ** -0.5
                projection.mul_(scale)
        head_std = min(0.02, 0.5 * config.dim**-0.5)
        nn.init.normal_(self.head_weight, std=head_std, generator=generator)
        if self.head is not None:
            nn.init.normal_(self.embedding.weight, std=config.init_std or 1.0, generator=generator)
        if self.position_embedding is not None:
            nn.init.normal_(self.position_embedding.weight, std=head_std, generator=generator)
        if self.bigram_embedding is not None:
            nn.init.zeros_(self.bigram_embedding.weight)
        for table in self.value_embeddings.parameters():
            nn.init.normal_(table, std=0.02, generator=generator)

    @property
    def head_weight(self) -> Tensor:
        """The matrix (V, D) that maps hidden states to logits."""
        return self.embedding.weight if self.head is None else self.head.weight

    def num_parameters(self) -> int:
        """Return the number of parameters, a tied matrix counted once."""
        return sum(p.numel() for p in self.parameters())

    def num_matmul_parameters(self) -> int:
        """Return the number of parameters in matrix products: all matrices but table look-ups."""
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2)
        return matrices + self.head_weight.numel()

    def flops_per_token(self) -> float:
        """Return the FLOPs of forward and backward for one trained token: 6·N + 12·L·H·K·T.

        N counts the parameters in matrix products, also those of a tied head. The attention term
        counts all T = ``seq_len`` keys for every query: causality does not halve it, as in the
        source, so figures compare with those of other trainers. Recomputation does not count.

        Source: Chowdhery et al. 2022, PaLM (arXiv:2204.02311), appendix B.
        """
        c = self.config
        attention = 12.0 * c.n_layers * c.n_heads * self.head_dim * self.seq_len
        return 6.0 * self.num_matmul_parameters() + attention

    def new_cache(self, batch_size: int, max_tokens: int) -> KVCache:
        """Return an empty cache for ``batch_size`` sequences of at most ``max_tokens``."""
        weight = self.embedding.weight
        n_kv = self.config.n_kv_heads or self.config.n_heads
        shape = (2, batch_size, n_kv, max_tokens, self.head_dim)
        return KVCache([weight.new_zeros(shape) for _ in self.blocks], max_tokens)

    def forward(
        self, tokens: Tensor, cache: KVCache | None = None, doc_starts: Tensor | None = None
    ) -> Tensor:
        """Return fp32 logits (B, T, V) for ``tokens``; arguments and errors are `hidden`'s."""
        # Not self.hidden: FSDP2 wraps that, and would gather the parameters once more within here.
        return self.logits(Transformer.hidden(self, tokens, cache, doc_starts))

    def hidden(
        self, tokens: Tensor, cache: KVCache | None = None, doc_starts: Tensor | None = None
    ) -> Tensor:
        """Return the normalised hidden states of ``tokens``.

        Args:
            tokens: int64 (B, T), each in [0, V); T and the cached length are at most ``seq_len``.
            cache: keys and values of the tokens before these, from `new_cache`; extended in place.
            doc_starts: bool (B, T), true at the first token of each document: no token then sees
                or depends on another document. None: a row is one document. Not with a cache.

        Returns:
            Hidden states (B, T, D); `logits` or a fused loss takes them from there.

        Raises:
            ValueError: the positions pass ``seq_len`` or the cache's room, or ``doc_starts`` and
                ``cache`` are both given.

        Numerics: learned positions count from each document's start. Rotary ones count on: the
            angle between two tokens depends on their distance alone.
        """
        if doc_starts is not None and cache is not None:
            raise ValueError("Transformer: doc_starts and cache exclude each other; omit one")
        t = tokens.shape[1]
        start, room = 0, self.seq_len
        if cache is not None:
            start, room = cache.length, min(room, cache.max_tokens)
        if start + t > room:
            raise ValueError(
                f"Transformer: {start} cached + {t} new tokens exceed the room for {room}; shorten "
                "the input or build the model with a larger seq_len"
            )
        x = self.embedding(tokens)  # (B, T, D)
        rope = None
        if self.position_embedding is None:
            rope = (self.rope_cos[start : start + t], self.rope_sin[start : start + t])
        elif doc_starts is None:
            x = x + self.position_embedding.weight[start : start + t]
        else:  # positions in each document
            position = torch.arange(t, device=tokens.device).expand_as(tokens)
            x = x + self.position_embedding(position - (position * doc_starts).cummax(1).values)
        if self.bigram_embedding is not None:
            x = x + self.bigram_embedding(self._pairs(tokens, cache, doc_starts))
        if self.config.embedding_norm:
            x = rms_norm(x, eps=self.config.norm_eps)
        x = F.dropout(x, self.config.dropout, self.training)
        kind = x.device.type
        if not self.config.residual_in_fp32 and torch.is_autocast_enabled(kind):
            x = x.bfloat16() if torch.get_autocast_dtype(kind) == torch.bfloat16 else x
        dropped = self.training and self.config.dropout > 0
        flex = tokens.is_cuda and cache is None and not dropped
        window = self.config.sliding_window_tokens
        mask = attention_mask(tokens, start=start, window=window, doc_starts=doc_starts, flex=flex)
        values = [table(tokens) for table in self.value_embeddings] or None
        caches = cache.layers if cache is not None else None
        hidden = self.blocks_fn(self.blocks, self.norm, x, rope, mask, caches, start, values)
        if cache is not None:
            cache.length = start + t
            cache.last_tokens = tokens[:, -1]
        return hidden

    def _pairs(self, tokens: Tensor, cache: KVCache | None, doc_starts: Tensor | None) -> Tensor:
        """Return the row (B, T) of each token's pair with the one before it, hashed.

        The first token of a text pairs with token 0. Source: modded-nanogpt's bigram embedding,
        after the n-gram hashing of Clark et al. 2022, CANINE (arXiv:2103.06874).
        """
        first = cache.last_tokens if cache is not None else None
        before = torch.zeros_like(tokens[:, :1]) if first is None else first[:, None]
        previous = torch.cat([before, tokens[:, :-1]], dim=1)
        if doc_starts is not None:
            previous = previous.masked_fill(doc_starts, 0)
        assert self.config.bigram_vocab_size is not None
        return ((previous * 36313) ^ (tokens * 27191)) % self.config.bigram_vocab_size

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., D) to fp32 logits (..., V), soft-capped where the config says so.

        Source of the softcap: Gemma 2 (arXiv:2408.00118).
        """
        logits = F.linear(hidden, self.head_weight).float()
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, index: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.n_rows = len(table)
        return F.embedding(index, table)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        (index,) = ctx.saved_tensors
        return None, torch.ops.fasttrain.embedding_backward(dy, index, ctx.n_rows)


# The gradient is an operation of its own, which the compiler calls as it is. Torch's would become
# atomic additions by several threads: slower, and in any order for the rows of one token.
_OPS: Any = torch.library.Library("fasttrain", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPS.define("embedding(Tensor index, Tensor table) -> Tensor")
_OPS.impl("embedding", _LookUp.apply, "CompositeImplicitAutograd")
_OPS.define("embedding_backward(Tensor dy, Tensor index, int n_rows) -> Tensor")
_OPS.impl(
    "embedding_backward",
    lambda *inputs: torch.ops.aten.embedding_dense_backward(*inputs, -1, False),
    "CompositeExplicitAutograd",
)


class Embedding(nn.Embedding):
    """Torch's without its options, which compiled code would ignore.

    Compiled, its gradient has the same bits each time; on a GPU where that is asked for.
    """

    def forward(self, index: Tensor) -> Tensor:
        """Return the rows (..., D) of the table (V, D) that ``index`` (...), int64, names."""
        plain = type(self.weight) is nn.Parameter  # not of several ranks
        exact = index.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        if plain and exact and torch.compiler.is_compiling():
            y: Tensor = torch.ops.fasttrain.embedding(index, self.weight)
            return y
        return super().forward(index)
