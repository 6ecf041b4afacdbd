"""Samples: which tokens of a dataset each row of a batch holds.

packed     window s is tokens[s·T : s·T + T + 1]: each token is a target once an epoch
sliding    windows begin every `stride_tokens`: each token is a target up to T / stride times
padded     a document a row, cut off behind T + 1 tokens or padded; each document once an epoch
bucketed   as padded, but `GROUP` rows that follow each other are of like length, and a batch is as
           long as its longest row needs: T, T/2, T/4 or T/8, few enough to compile each

Padding has no targets, and no token sees it: it lies behind the document, attention is causal.
A row is T + 1 tokens, or fewer: T of them inputs, each with the next one as its target. Packed and
sliding rows go on over the end of a document: what follows it is predicted from its last token, as
a new text is when it is generated. Whether the new document also *sees* the one before it is for
attention to say (`document_starts`).

Which sample comes when is a pure function of (seed, global sample index), whatever the batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fasttrain.config.keys import refuse
from fasttrain.data.dataset import TokenDataset
from fasttrain.data.files import DataError
from fasttrain.data.mixing import Interleave
from fasttrain.data.sampler import Permutation, sample_ids

__all__ = ["BATCHING", "Plan", "document_rows", "document_starts", "row_lengths"]

BATCHING = ("packed", "sliding", "padded", "bucketed")
# Rows of one length in a row. It must not depend on the size of a batch, or resuming with another
# one would lose and repeat documents. Larger, and many steps have only long or only short rows.
GROUP = 64

Array = NDArray[np.int64]


def row_lengths(batching: str, seq_len: int) -> tuple[int, ...]:
    """The lengths T that batches may have, ascending."""
    if batching != "bucketed":
        return (seq_len,)
    return tuple(sorted({-(-seq_len // part) for part in (8, 4, 2, 1)}))


def document_starts(ends: Array, starts: Array, length: int) -> NDArray[np.bool_]:
    """Where documents begin in windows of tokens.

    Args:
        ends: Of all documents, ascending.
        starts: First token of each window, shape (n,).
        length: Of the windows.

    Returns:
        Shape (n, length), true at the first token of a document and of a window.
    """
    found = np.zeros((len(starts), length), np.bool_)
    first = np.searchsorted(ends, starts, side="right")
    n = np.searchsorted(ends, starts + length, side="left") - first
    row = np.repeat(np.arange(len(starts)), n)
    which = np.arange(len(row)) + np.repeat(first - np.cumsum(n) + n, n)
    found[row, ends[which] - starts[row]] = True
    found[:, 0] = True
    return found


def document_rows(dataset: TokenDataset, seq_len: int) -> tuple[Array, Array]:
    """All documents in pieces of at most T targets, so that each token but the first is one.

    Returns:
        First token of each piece, and its tokens, one more than it has targets.
    """
    begins, sizes = _documents(dataset, 0, dataset.n_tokens)
    n = -(-(sizes - 1) // seq_len)
    which = np.repeat(np.arange(len(n)), n)
    skipped = (np.arange(len(which)) - np.repeat(np.cumsum(n) - n, n)) * seq_len
    return begins[which] + skipped, np.minimum(sizes[which] - skipped, seq_len + 1)


def _documents(dataset: TokenDataset, begin: int, end: int) -> tuple[Array, Array]:
    """First token and number of tokens of the documents in [begin, end); of two tokens at least."""
    ends = dataset.document_ends
    ends = ends[np.searchsorted(ends, begin, side="right") :]
    ends = ends[: np.searchsorted(ends, end, side="right")]
    begins = np.concatenate([[begin], ends[:-1]])
    sizes = ends - begins
    return begins[sizes > 1], sizes[sizes > 1]


class _Samples:
    """The samples of a stretch of a split, as `Plan` has it; `order` says when each comes."""

    def __init__(
        self, dataset: TokenDataset, begin: int, end: int, batching: str, seq_len: int, stride: int
    ) -> None:
        tokens = end - begin
        if batching in ("packed", "sliding"):
            if tokens <= seq_len:
                raise DataError(
                    f"data.seq_len = {seq_len} is longer than the data: the split has {tokens} "
                    f"tokens, {seq_len + 1} make one sample; shorten data.seq_len to at most "
                    f"{max(tokens - 1, 0)} or add text"
                )
            self.n = (tokens - 1 - seq_len) // stride + 1
            self.dropped_tokens = tokens - 1 - seq_len - (self.n - 1) * stride
            self._begin, self._stride = begin, stride
            self._counts: Array | None = None
        elif batching in ("padded", "bucketed"):
            self._begins, sizes = _documents(dataset, begin, end)
            self._counts = np.minimum(sizes, seq_len + 1)
            self.n = len(sizes)
            self.dropped_tokens = int((sizes - self._counts).sum())
            if not self.n:
                raise DataError(
                    f"data.batching = {batching!r}: no document of "
                    f"{dataset.shards[0].path.parent} has two tokens; use data.batching = 'packed'"
                )
        else:
            refuse("data.batching", batching, "is not implemented; add it to _Samples")
        self._buckets = (
            _Buckets(self._counts - 1, row_lengths(batching, seq_len))
            if batching == "bucketed" and self._counts is not None
            else None
        )

    def order(self, first: int, count: int, seed: int) -> Array:
        """Which samples come at positions [first, first + count)."""
        if self._buckets is not None:
            return self._buckets.order(first, count, seed)
        return sample_ids(first, count, n=self.n, seed=seed)

    def rows(self, ids: Array) -> tuple[Array, Array | None]:
        """First token and number of tokens of samples; no numbers: all are T + 1."""
        if self._counts is None:
            return self._begin + ids * self._stride, None
        return self._begins[ids], self._counts[ids]


class _Buckets:
    """The order of samples by length: groups of `GROUP` of one bucket, all buckets mixed.

    A bucket's samples are permuted, then cut into groups, and the groups of all buckets permuted.
    What fills no group comes at the end of the epoch, bucket after bucket.
    """

    def __init__(self, lengths: Array, limits: Sequence[int]) -> None:
        bucket = np.searchsorted(limits, lengths)
        self._by_bucket = np.argsort(bucket, kind="stable")
        self._sizes = np.bincount(bucket, minlength=len(limits))
        self._first = np.cumsum(self._sizes) - self._sizes
        self._groups = self._sizes // GROUP
        self._first_group = np.cumsum(self._groups) - self._groups
        rest = self._sizes - self._groups * GROUP
        self._first_rest = np.cumsum(rest) - rest
        self._n, self._n_groups = len(lengths), int(self._groups.sum())

    def order(self, first: int, count: int, seed: int) -> Array:
        """Which samples come at positions [first, first + count)."""
        parts = [np.empty(0, np.int64)]
        while count > 0:
            epoch, at = divmod(first, self._n)
            part = min(count, self._n - at)
            parts.append(self._in_epoch(at, part, (seed << 64) + epoch))
            first, count = first + part, count - part
        return np.concatenate(parts)

    def _in_epoch(self, first: int, count: int, key: int) -> Array:
        at = np.arange(first, first + count)
        n_grouped = self._n_groups * GROUP
        group, within = np.divmod(at[at < n_grouped], GROUP)
        if group.size:
            group = Permutation(self._n_groups, key).take(group)
        of_group = np.searchsorted(self._first_group, group, side="right") - 1
        rank = (group - self._first_group[of_group]) * GROUP + within
        rest = at[at >= n_grouped] - n_grouped
        of_rest = np.searchsorted(self._first_rest, rest, side="right") - 1
        rest = rest - self._first_rest[of_rest] + self._groups[of_rest] * GROUP
        bucket, rank = np.concatenate([of_group, of_rest]), np.concatenate([rank, rest])
        found = np.empty(count, np.int64)
        for number in np.unique(bucket).tolist():
            here = bucket == number
            order = Permutation(int(self._sizes[number]), ((number + 1) << 200) + key)
            found[here] = self._by_bucket[self._first[number] + order.take(rank[here])]
        return found


class Plan:
    """Which tokens each global sample index of a run stands for.

    Args:
        dataset: The split.
        batching: One of `BATCHING`.
        seq_len: T, the longest row.
        seed: Of the order.
        stride_tokens: Between the starts of sliding windows; None: half of T.
        weights: Shares of the datasets that `dataset` was joined of, each in an order of its own;
            empty: all its samples in one order.

    Attributes:
        samples_per_epoch: Samples of the split; of a mix, those of all its datasets.
        dropped_tokens: Tokens that no row holds: the end of the split, too short for a window, or
            what documents have beyond T + 1.

    Raises:
        DataError: There is not one sample, or the documents are not known.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        batching: str,
        seq_len: int,
        seed: int,
        stride_tokens: int | None = None,
        weights: Sequence[float] = (),
    ) -> None:
        if batching not in BATCHING:
            raise ValueError(f"Plan: batching must be one of {BATCHING}, got {batching!r}")
        if weights and len(weights) != len(dataset.joined):
            raise ValueError(
                f"Plan: {len(weights)} weights for {len(dataset.joined)} joined datasets"
            )
        stride = seq_len
        if batching == "sliding":
            stride = stride_tokens or max(seq_len // 2, 1)
        sizes = [part.n_tokens for part in dataset.joined] if weights else [dataset.n_tokens]
        ends = np.cumsum(sizes).tolist()
        self._parts = [
            _Samples(dataset, end - size, end, batching, seq_len, stride)
            for size, end in zip(sizes, ends, strict=True)
        ]
        self._first_ids = np.cumsum([0, *(part.n for part in self._parts)])
        self._interleave = Interleave(weights) if weights else None
        self._seed, self._lengths = seed, row_lengths(batching, seq_len)
        self.samples_per_epoch = int(self._first_ids[-1])
        self.dropped_tokens = sum(part.dropped_tokens for part in self._parts)

    def _located(self, first: int, count: int) -> list[tuple[Array | slice, int, Array]]:
        """Of each dataset: which of the positions are its, its number, its samples there."""
        if self._interleave is None:
            return [(slice(None), 0, self._parts[0].order(first, count, self._seed))]
        source, index = self._interleave.locate(first, count)
        found: list[tuple[Array | slice, int, Array]] = []
        for number in np.unique(source).tolist():
            at = np.flatnonzero(source == number)
            # A dataset's own samples come one after the other. The first has the run's seed.
            seed = (number << 64) + self._seed
            found.append((at, number, self._parts[number].order(int(index[at[0]]), len(at), seed)))
        return found

    def ids(self, first: int, count: int) -> Array:
        """Samples at positions [first, first + count): each sample of the split has a number."""
        found = np.empty(count, np.int64)
        for at, number, ids in self._located(first, count):
            found[at] = self._first_ids[number] + ids
        return found

    def rows(self, first: int, count: int) -> tuple[Array, Array | None]:
        """First token and number of tokens at [first, first + count); None: all are T + 1."""
        starts = np.empty(count, np.int64)
        counts: Array | None = None
        for at, number, ids in self._located(first, count):
            starts[at], n_tokens = self._parts[number].rows(ids)
            if n_tokens is not None:
                counts = np.empty(count, np.int64) if counts is None else counts
                counts[at] = n_tokens
        return starts, counts

    def length(self, counts: Array | None) -> int:
        """T of a batch of rows of so many tokens: the shortest of `row_lengths` that holds them."""
        if counts is None or len(self._lengths) == 1:
            return self._lengths[-1]
        return next(length for length in self._lengths if length >= int(counts.max()) - 1)
