"""Text from a model, token by token: what a run samples, and what ``fasttrain.generate`` prints.

Keys and values of earlier tokens are cached, so that a token costs a forward pass of one position.
A text longer than the model's ``seq_len`` slides: when the cache is full, the last half of it is
encoded again and the rest dropped, so each token sees between seq_len/2 and seq_len tokens.

Legend: B batch, T prompt tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.config import UserError
from fasttrain.distributed.sharding import evaluating
from fasttrain.distributed.world import World
from fasttrain.model.transformer import Transformer


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token for each row of logits (B, V); return them as int64 (B,).

    ``temperature`` divides the logits; at 0, or with ``greedy``, the likeliest token is taken.
    ``top_k`` keeps the k likeliest tokens, more where the k-th ties. Of those ``top_p`` keeps the
    fewest that together reach this probability, in (0, 1].

    Raises:
        ValueError: an option is out of range.

    Source: top-k: Fan et al. 2018, arXiv:1805.04833; top-p: Holtzman et al. 2020, arXiv:1904.09751.
    """
    if temperature < 0.0:
        raise ValueError(f"temperature must be at least 0 (0: greedy), got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if greedy or temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered  # probability of all likelier tokens
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    # multinomial divides by the sum itself
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


@torch.no_grad()
def stream(
    model: Transformer,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    lengths: Sequence[int] = (),
    **sampling: Any,
) -> Iterator[Tensor]:
    """Yield what `generate` appends to ``tokens``, one (B,) at a time, as it is drawn.

    ``lengths`` of the rows' prompts, if they differ: the rows are padded on the right. The stream
    then begins after the shortest prompt, and a longer one continues with its own tokens first.
    """
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        problem = f"tokens must be (B, T) with T at least 1, got {tuple(tokens.shape)}"
        raise ValueError(f"generate: {problem}; start an empty prompt with the end-of-text token")
    limit, (n_rows, longest) = model.seq_len, tokens.shape
    first = min(lengths, default=longest)
    ends = torch.tensor(lengths or [first] * n_rows, device=tokens.device)
    recent = tokens[:, :first][:, -limit:]  # not in the cache, or encoded again when it is full
    cache = model.new_cache(n_rows, min(limit, longest + max_new_tokens))
    pending = recent
    for position in range(first, longest + max_new_tokens):
        if cache.length + pending.shape[1] > limit:
            cache.length, cache.last_tokens = 0, None
            pending = recent = recent[:, -max(1, limit // 2) :]
        hidden = model.hidden(pending, cache)[:, -1]  # (B, D)
        logits = model.logits(hidden)
        if not torch.isfinite(logits).all():
            remedy = "use an earlier checkpoint, or train it with a lower optim.lr"
            raise UserError(f"the model's logits are not finite; {remedy}")
        drawn = sample_tokens(logits, **sampling)
        if position < longest:
            drawn = torch.where(position < ends, tokens[:, position], drawn)
        yield drawn
        pending = drawn[:, None]
        recent = torch.cat([recent, pending], dim=1)


def generate(
    model: Transformer,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    stop_token: int | None = None,
    **sampling: Any,
) -> Tensor:
    """Return the prompts (B, T) with up to ``max_new_tokens`` drawn tokens appended to each.

    The model computes in evaluation mode and is left in the mode it was in. Of a prompt longer than
    ``model.seq_len`` it sees the last ``seq_len`` tokens. A row that draws ``stop_token`` is
    finished and filled up with it. ``sampling`` are the options of `sample_tokens`.

    Raises:
        ValueError: ``tokens`` is not (B, T) with T ≥ 1, or a sampling option is out of range.
        UserError: the model computes what is not finite.

    Numerics: in fp32 a cached step gives the logits of an uncached one to rounding.
    Memory: the cache: two (B, n_kv_heads, min(seq_len, T + max_new_tokens), head_dim) per layer.
    """
    columns = [tokens]
    finished = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    with evaluating(model, World()):
        for drawn in stream(model, tokens, max_new_tokens=max_new_tokens, **sampling):
            if stop_token is not None:
                drawn = drawn.masked_fill(finished, stop_token)
                finished |= drawn == stop_token
            columns.append(drawn[:, None])
            if stop_token is not None and bool(finished.all()):
                break
    return torch.cat(columns, dim=1)
