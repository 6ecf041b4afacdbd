"""The order of samples: a keyed bijection, a pure function of (seed, epoch, index).

A Feistel network works on the pair (x, y) = (i mod a, i div a), with a·b ≥ n. Each round adds a
hash of one half to the other, modulo a or b in turn. Every round is a bijection on [0, a·b), and so
is their composition. As a·b < n + a, fewer than a values lie outside [0, n); those walk the
permutation on until they are inside, which leaves a bijection on [0, n). No table, no state: any
index costs the same, at any point of a run, on any number of ranks.

Sources: Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains" (unbalanced Feistel, cycle
walking); Steele, Lea & Flood 2014, "Fast Splittable Pseudorandom Number Generators" (the mixer).
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fasttrain.config import TrainConfig
from fasttrain.config.keys import refuse
from fasttrain.data.dataset import Array, TokenDataset
from fasttrain.storage import DataError

Order = Callable[[Array, int, int], Array]  # called as `permute` is

ROUNDS = 8  # even, so that both halves are mixed alike; four already pass the suite's tests


def permute(indices: Array, n: int, key: int) -> Array:
    """Return where a bijection on [0, n) sends `indices`, about 0.1 µs each.

    0 < n ≤ 2**62; the key, any integer, chooses the bijection.
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    digest = hashlib.shake_256(f"fasttrain order {key}".encode()).digest(8 * ROUNDS)
    keys = np.frombuffer(digest, "<u8").reshape(-1, 2)

    def once(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        y, x = np.divmod(values, np.uint64(a))
        for of_x, of_y in keys:
            x = (x + _mix(y, of_x) % np.uint64(a)) % np.uint64(a)
            y = (y + _mix(x, of_y) % np.uint64(b)) % np.uint64(b)
        return x + y * np.uint64(a)

    out = once(indices.astype(np.uint64).ravel())
    while (outside := np.flatnonzero(out >= n)).size:
        out[outside] = once(out[outside])
    return out.astype(np.int64).reshape(indices.shape)


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """A hash of each value under a key, uniform on 64 bits."""
    z = values ^ key  # distinct values stay distinct: every step is a bijection
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample_ids(first: int, count: int, seed: int, *, n: int, order: Order = permute) -> Array:
    """Return which sample each of `count` global sample indices from `first` on is.

    The indices count from 0 over the whole run, of epochs of `n` samples: for index i it is the
    sample that the order of epoch i // n puts at i mod n.
    """
    parts = [np.empty(0, np.int64)]
    while count > 0:
        epoch, at = divmod(first, n)
        part = min(count, n - at)
        # One integer of which (seed, epoch) can be read back: no two share a key.
        parts.append(order(np.arange(at, at + part), n, (seed << 64) + epoch))
        first, count = first + part, count - part
    return np.concatenate(parts)


# Four decimals are exact. Making the table takes 30 ms for three datasets.
MAX_PERIOD = 10_000


def _whole(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportions of `weights`, with a sum of at most `MAX_PERIOD`."""
    exact = [Fraction(str(weight)) for weight in weights]  # as written: 0.1 is a tenth
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= MAX_PERIOD:
        return [int(share * period) for share in shares]
    room = MAX_PERIOD - len(shares)  # each gets at least one turn
    whole = [int(share * room) for share in shares]
    by_rest = sorted(range(len(shares)), key=lambda i: whole[i] - shares[i] * room)
    more = by_rest[: room - sum(whole)]
    return [1 + n + (i in more) for i, n in enumerate(whole)]


class Interleave:
    """Whose turn it is, of datasets with `weights` above 0; only their proportions count.

    Proportions that need a period of more than `MAX_PERIOD` samples are rounded to it.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.turns = np.array(_whole(weights), np.int64)  # of each in one period
        turns: list[int] = self.turns.tolist()
        period, n = sum(turns), len(turns)
        slack = max(2 * n - 2, 1)
        common = math.lcm(*turns)
        done = [0] * n
        self._source, self._index = np.empty((2, period), np.int64)
        for t in range(period):
            # What each is owed at the end of this turn, times period·slack; due from `period` on.
            owed = [(turns[i] * (t + 1) - done[i] * period) * slack for i in range(n)]
            # The sooner its debt reaches slack − 1, the less its turn may be put off.
            due = (i for i in range(n) if owed[i] >= period)
            chosen = min(due, key=lambda i: ((slack - 1) * period - owed[i]) * (common // turns[i]))
            self._source[t], self._index[t] = chosen, done[chosen]
            done[chosen] += 1

    def locate(self, first: int, count: int) -> tuple[Array, Array]:
        """Return the dataset of each position from `first` on, and its earlier turns."""
        periods, at = np.divmod(np.arange(first, first + count), len(self._source))
        source = self._source[at]
        return source, periods * self.turns[source] + self._index[at]


# Rows of one length in a row. It must not depend on the size of a batch, or resuming with another
# one would lose and repeat documents. Larger, and many steps have only long or only short rows.
GROUP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderOptions:
    """What the samples of a run are, their order, and which of them a rank gets in its batches."""

    seq_len: int  # T
    micro_batch: int = 1  # B
    seed: int = 0
    batching: str = "packed"
    stride_tokens: int | None = None  # between the starts of sliding windows; None: half of T
    weights: Sequence[float] = ()  # of the datasets that were joined; empty: taken as one
    separate_documents: bool = False  # mark in `doc_starts` where documents begin in a window
    epochs: float | None = None  # passes over the split, after which the batches end; None: never
    rank: int = 0
    world_size: int = 1
    prefetch: int = 16  # batches held ready; half of them are read at a time

    @classmethod
    def of(cls, config: TrainConfig, **others: Any) -> Self:
        """Return the options that a config names, with `others` in place of or beside these."""
        keys = ("seq_len", "batching", "stride_tokens", "weights", "prefetch")
        named: dict[str, Any] = {key: getattr(config.data, key) for key in keys}
        named["separate_documents"] = not config.data.attention_across_documents
        return cls(**named | {"seed": config.run.seed, "epochs": config.train.epochs} | others)

    @property
    def of_windows(self) -> bool:
        """Whether samples are windows of the text; else they are documents."""
        if self.batching not in ("packed", "sliding", "padded", "bucketed"):
            refuse("data.batching", self.batching, "is not implemented; add it to LoaderOptions")
        return self.batching in ("packed", "sliding")

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths T that batches may have, ascending."""
        parts = (8, 4, 2, 1) if self.batching == "bucketed" else (1,)
        return tuple(sorted({-(-self.seq_len // part) for part in parts}))


def document_starts(ends: Array, starts: Array, length: int) -> NDArray[np.bool_]:
    """Return where documents begin in windows that start at `starts` (n,): bool (n, length).

    True at the first token of a document and of a window; `ends` are of all documents, ascending.
    """
    found = np.zeros((len(starts), length), np.bool_)
    first = np.searchsorted(ends, starts, side="right")
    n = np.searchsorted(ends, starts + length, side="left") - first
    row = np.repeat(np.arange(len(starts)), n)
    which = np.arange(len(row)) + np.repeat(first - np.cumsum(n) + n, n)
    found[row, ends[which] - starts[row]] = True
    found[:, 0] = True
    return found


def document_rows(dataset: TokenDataset, seq_len: int, whole: bool = True) -> tuple[Array, Array]:
    """Return all documents in pieces of at most T targets: each token but the first is one.

    First token of each piece, and its tokens, one more than it has targets; if not `whole`, of the
    first piece of each document alone.
    """
    ends = dataset.document_ends
    sizes = np.diff(ends, prepend=0)
    n = -(-(sizes - 1) // seq_len) if whole else np.minimum(sizes - 1, 1)
    which = np.repeat(np.arange(len(n)), n)
    skipped = (np.arange(len(which)) - np.repeat(np.cumsum(n) - n, n)) * seq_len
    begins = ends[which] - sizes[which] + skipped
    return begins, np.minimum(sizes[which] - skipped, seq_len + 1)


def _bucketed(lengths: Array, limits: Sequence[int]) -> Order:
    """Return what permutes the samples of an epoch by their length.

    A sample belongs to the bucket of the smallest of ``limits`` that holds its length. The samples
    of each bucket are permuted and cut into groups of `GROUP`. The groups of all buckets are
    permuted, and come first. What fills no group comes at the end, bucket after bucket.

    For example, with ``GROUP = 2``, ``limits = (4, 8)`` and seven samples of the lengths 3, 7, 2,
    8, 1, 5 and 6, the buckets are::

        up to 4: samples 0, 2, 4        permuted, say, to 4, 0, 2
        up to 8: samples 1, 3, 5, 6     permuted, say, to 6, 1, 3, 5

    The groups (4, 0), (6, 1) and (3, 5) are permuted, say, to (6, 1), (4, 0), (3, 5); sample 2 is
    left over. The epoch is 6, 1, 4, 0, 3, 5, 2.

    Args:
        lengths: Of all samples of an epoch.
        limits: The greatest length in each bucket, ascending.
    """
    bucket_of_sample = np.searchsorted(limits, lengths)
    by_bucket = np.argsort(bucket_of_sample, kind="stable")  # samples, bucket after bucket
    sizes = np.bincount(bucket_of_sample)  # samples in each bucket
    first_of_bucket = np.cumsum(sizes) - sizes  # in `by_bucket`
    # An epoch has two parts for each bucket: first all that are in groups, then all left over.
    grouped = sizes - sizes % GROUP
    n_grouped = int(grouped.sum())
    part_sizes = np.concatenate([grouped, sizes - grouped])
    part_begins = np.cumsum(part_sizes) - part_sizes
    first_ranks = np.concatenate([np.zeros_like(grouped), grouped])  # in the bucket, of each part

    def order(at: Array, n: int, key: int) -> Array:
        # Permute the groups; a sample keeps its place within its group.
        group, within = np.divmod(at[at < n_grouped], GROUP)
        group = permute(group, max(n_grouped // GROUP, 1), key)
        at = np.concatenate([group * GROUP + within, at[at >= n_grouped]])
        # Find each one's bucket, and its rank there.
        part = np.searchsorted(part_begins, at, side="right") - 1
        bucket = part % len(sizes)
        rank = first_ranks[part] + at - part_begins[part]
        # Permute within each bucket.
        samples = np.empty(len(at), np.int64)
        for number in np.unique(bucket).tolist():
            of_bucket = bucket == number
            bucket_key = ((number + 1) << 200) + key
            place = permute(rank[of_bucket], int(sizes[number]), bucket_key)
            samples[of_bucket] = by_bucket[first_of_bucket[number] + place]
        return samples

    return order


class SampleOrder:
    """Which tokens each global sample index of a run stands for.

    With weights, each of the datasets joined in `dataset` has a share and an order of its own.
    """

    def __init__(self, dataset: TokenDataset, options: LoaderOptions) -> None:
        batching, seq_len = options.batching, options.seq_len
        parts = dataset.joined if options.weights else [dataset]
        self._interleave = Interleave(options.weights or [1])
        self._options, self._stride = options, seq_len
        if batching == "sliding":
            self._stride = options.stride_tokens or max(seq_len // 2, 1)
        n_tokens = np.array([part.n_tokens for part in parts])
        self._first_tokens = np.cumsum([0, *n_tokens])
        # First token and number of tokens of each document; None: windows, which are computed.
        self._documents: tuple[Array, Array] | None = None
        if options.of_windows:
            if (least := int(n_tokens.min())) <= seq_len:
                problem = f"data.seq_len = {seq_len} is longer than the data"
                why = f"the split has {least} tokens, {seq_len + 1} make one sample"
                remedy = f"shorten data.seq_len to at most {max(least - 1, 0)} or add text"
                raise DataError(f"{problem}: {why}; {remedy}")
            last, dropped = np.divmod(n_tokens - 1 - seq_len, self._stride)
            self._first_ids = np.cumsum([0, *(last + 1)])
        else:
            begins, counts = self._documents = document_rows(dataset, seq_len, whole=False)
            dropped = dataset.n_tokens - counts.sum()
            self._first_ids = np.searchsorted(begins, self._first_tokens)
            for part, n in zip(parts, np.diff(self._first_ids), strict=True):
                if not n:
                    problem = f"no document of {part.shards[0].path.parent} has two tokens"
                    remedy = "use data.batching = 'packed'"
                    raise DataError(f"data.batching = {batching!r}: {problem}; {remedy}")
        # Tokens in no row: an end too short for a window, documents of one, others' beyond T + 1.
        self.dropped_tokens = int(dropped.sum())
        self.samples_per_epoch = int(self._first_ids[-1])
        self._orders: list[Order] = [permute] * len(parts)
        if batching == "bucketed":
            cuts = self._first_ids[1:-1]
            self._orders = [_bucketed(c - 1, options.lengths) for c in np.split(counts, cuts)]

    def ids(self, first: int, count: int) -> Array:
        """Samples at positions [first, first + count): each sample of the split has a number."""
        found, sizes = np.empty(count, np.int64), np.diff(self._first_ids).tolist()
        source, index = self._interleave.locate(first, count)
        for number in np.unique(source).tolist():
            at = np.flatnonzero(source == number)
            # A dataset's own samples come one after the other. The first has the run's seed.
            stretch = (int(index[at[0]]), len(at), (number << 64) + self._options.seed)
            ids = sample_ids(*stretch, n=sizes[number], order=self._orders[number])
            found[at] = self._first_ids[number] + ids
        return found

    def rows(self, first: int, count: int) -> tuple[Array, Array]:
        """First token and number of tokens, up to T + 1, of samples [first, first + count)."""
        ids = self.ids(first, count)
        if self._documents is not None:
            begins, counts = self._documents
            return begins[ids], counts[ids]
        part = np.searchsorted(self._first_ids, ids, side="right") - 1
        starts = self._first_tokens[part] + (ids - self._first_ids[part]) * self._stride
        return starts, np.full(count, self._options.seq_len + 1)
