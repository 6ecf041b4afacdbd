"""Batches of a held-out split: every target once, in rows of the kind that training has."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from fasttrain.config.keys import refuse
from fasttrain.data.dataset import TokenDataset
from fasttrain.data.files import DataError
from fasttrain.data.loader import IGNORE, Batch, to_batch
from fasttrain.data.order import Array, document_rows, document_starts, row_lengths


def evaluation_batches(
    dataset: TokenDataset,
    *,
    seq_len: int,
    batch_size: int,
    device: torch.device | str,
    batching: str = "packed",
    separate_documents: bool = False,
    stride_tokens: int | None = None,
    n_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """The split once, or as many of its rows, evenly spread, as make ``n_tokens`` targets.

    Packed and sliding: windows side by side, or overlapping where `stride_tokens` is set, and of
    all but the first only the last `stride_tokens` are targets: they see at least the T −
    `stride_tokens` tokens before them. Either way every token but the first is a target once.
    Padded and bucketed: documents, the long ones in pieces of T, so that every token but the first
    of each document is a target once; bucketed in order of their length, others as they lie.
    Every rank gets the same number of batches; what lies beyond the rows is token 0 with target
    −100.

    `n_tokens` None: all. `batching` and `separate_documents` are as in training; each rank takes
    every world_size-th batch; `position` counts rows. A file may turn out damaged while iterating.
    """
    device = torch.device(device)
    ends = None
    n_seen = 0  # tokens of a window that were targets of the one before
    if batching in ("padded", "bucketed"):
        starts, counts = _spread(*document_rows(dataset, seq_len), 0, n_tokens)
        if batching == "bucketed":
            by_length = np.argsort(counts, kind="stable")
            starts, counts = starts[by_length], counts[by_length]
    elif batching in ("packed", "sliding"):
        n_seen = seq_len - (stride_tokens or seq_len)
        end = dataset.n_tokens - 1
        starts = np.arange(0, max(end - n_seen, min(end, 1)), seq_len - n_seen)
        counts = np.minimum(dataset.n_tokens - starts, seq_len + 1)
        starts, counts = _spread(starts, counts, n_seen, n_tokens)
        ends = dataset.document_ends if separate_documents else None
    else:
        refuse("data.batching", batching, "is not implemented; add it to evaluation_batches")
    if not len(starts):
        raise DataError(
            f"a validation split of {dataset.n_tokens} tokens has nothing to predict; prepare it "
            "with a larger --val-fraction"
        )
    lengths = row_lengths(batching, seq_len)

    def batch(first: int) -> Batch:
        here = slice(first, first + batch_size)
        n_rows = len(starts[here])
        start, count = np.zeros((2, batch_size), np.int64)  # what is beyond has no tokens
        start[:n_rows], count[:n_rows] = starts[here], counts[here]
        length = next(n for n in lengths if n >= count.max() - 1)
        stored = np.zeros((batch_size, length + 1), dataset.dtype)
        if n_rows:
            dataset.read_windows(start[:n_rows], stored[:n_rows], count[:n_rows])
        marks = None if ends is None else torch.from_numpy(document_starts(ends, start, length))
        found = to_batch(
            stored, torch.from_numpy(np.maximum(count - 1, 0)), marks, first + batch_size
        )
        found.targets[torch.from_numpy(start > 0), :n_seen] = IGNORE
        if device.type != "cuda":
            return found
        tokens, targets, doc_starts = (
            None if t is None else t.pin_memory().to(device, non_blocking=True)
            for t in (found.tokens, found.targets, found.doc_starts)
        )
        assert tokens is not None
        assert targets is not None
        return Batch(tokens, targets, doc_starts, found.position)

    stride = batch_size * world_size
    return (batch(first + rank * batch_size) for first in range(0, len(starts), stride))


def _spread(starts: Array, counts: Array, n_seen: int, n_tokens: int | None) -> tuple[Array, Array]:
    """Return every k-th row, k a fraction, so that they have ``n_tokens`` targets."""
    n_targets = int(counts.sum()) - len(counts) * (1 + n_seen)
    if n_tokens is None or n_tokens >= n_targets:
        return starts, counts
    n_rows = math.ceil(len(starts) * n_tokens / n_targets)
    chosen = np.arange(n_rows) * len(starts) // n_rows
    return starts[chosen], counts[chosen]
