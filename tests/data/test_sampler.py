"""The order of samples: a bijection, another one each epoch, the same for everybody; mixing."""

import itertools
import math
from fractions import Fraction

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fasttrain.data.order import MAX_PERIOD, Interleave, permute, sample_ids

KEYS = st.integers(-(2**70), 2**140)


@settings(max_examples=60)
@given(n=st.integers(1, 10**6), key=KEYS)
@example(n=1, key=0)
@example(n=2, key=1)
@example(n=10**6, key=7)
@example(n=2**19 + 1, key=7)
def test_R28_every_n_up_to_a_million_gives_a_bijection(n: int, key: int) -> None:
    out = permute(np.arange(n), n, key)
    assert out.dtype == np.int64
    assert np.array_equal(np.bincount(out, minlength=n), np.ones(n))


def test_R28_every_n_up_to_300_gives_a_bijection() -> None:
    for n in range(1, 301):
        assert sorted(permute(np.arange(n), n, n).tolist()) == list(range(n))


@settings(max_examples=50)
@given(n=st.integers(1, 2**62), key=KEYS, data=st.data())
def test_one_index_and_many_agree_and_stay_inside(n: int, key: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, n - 1))
    out = int(permute(np.array([index]), n, key)[0])
    assert 0 <= out < n
    square = permute(np.array([[index, 0], [n - 1, index]]), n, key)
    assert square[[0, 1], [0, 1]].tolist() == [out] * 2


@given(n=st.integers(20, 10**6), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_R28_epochs_and_seeds_differ(n: int, seed: int, epoch: int) -> None:
    def epoch_order(seed: int, epoch: int) -> list[int]:
        return sample_ids(epoch * n, 20, seed, n=n).tolist()

    assert epoch_order(seed, epoch) == epoch_order(seed, epoch)
    assert epoch_order(seed, epoch) != epoch_order(seed, epoch + 1)
    assert epoch_order(seed, epoch) != epoch_order(seed + 1, epoch)
    assert epoch_order(seed, epoch + 1) != epoch_order(seed + 1, epoch)


@given(
    n=st.integers(1, 200),
    seed=st.integers(0, 2**32),
    first=st.integers(0, 1000),
    cuts=st.lists(st.integers(0, 150), max_size=6),
)
def test_R28_any_partition_of_a_run_gives_the_same_order(
    n: int, seed: int, first: int, cuts: list[int]
) -> None:
    whole = sample_ids(first, sum(cuts), seed, n=n)
    parts, at = [], first
    for count in cuts:
        parts.append(sample_ids(at, count, seed, n=n))
        at += count
    assert whole.tolist() == [int(i) for part in parts for i in part]


@given(n=st.integers(1, 300), seed=st.integers(0, 2**32), epoch=st.integers(0, 50))
def test_R3_every_sample_once_an_epoch(n: int, seed: int, epoch: int) -> None:
    ids = sample_ids(epoch * n, 2 * n, seed, n=n)
    assert sorted(ids[:n].tolist()) == list(range(n))
    assert sorted(ids[n:].tolist()) == list(range(n))


def test_the_order_is_this_one_on_every_machine() -> None:
    # A run resumed elsewhere must go on in the same order: these values may never change.
    assert sample_ids(0, 8, 1337, n=1000).tolist() == [473, 733, 79, 493, 270, 443, 366, 151]
    assert sample_ids(7996, 8, 1337, n=1000).tolist() == [
        230,
        87,
        679,
        557,
        852,
        908,
        944,
        404,
    ]
    assert permute(np.array([123_456_789]), 10**12, 1).tolist() == [860156640867]


def test_the_order_looks_random() -> None:
    n, epochs = 1009, 400
    orders = np.stack([sample_ids(e * n, n, 3, n=n) for e in range(epochs)])
    # Where sample 0, sample 1 … come, over epochs: uniform, so mean and spread are those of one
    # uniform draw; five standard errors either way.
    error = n / 12**0.5 / epochs**0.5
    assert np.abs(orders.mean(axis=0) - (n - 1) / 2).max() < 5 * error
    # Neighbours in order are no neighbours in the data, and no epoch correlates with the next.
    steps = np.abs(np.diff(orders, axis=1))
    assert abs(steps.mean() - n / 3) < 5 * n / (18 * steps.size / 2) ** 0.5
    close = [np.corrcoef(a, b)[0, 1] for a, b in itertools.pairwise(orders)]
    assert np.abs(close).max() < 5 / n**0.5
    assert np.abs([np.corrcoef(o, np.arange(n))[0, 1] for o in orders]).max() < 5 / n**0.5


def test_small_orders_all_come_up() -> None:
    seen = {tuple(sample_ids(4 * e, 4, 0, n=4).tolist()) for e in range(600)}
    assert len(seen) == 24


@given(
    weights=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    scale=st.sampled_from([1.0, 0.01]),
)
def test_every_dataset_is_within_one_of_its_share_at_every_point(
    weights: list[int], scale: float
) -> None:
    mix = Interleave([weight * scale for weight in weights])
    n = 3 * sum(weights) + 7
    source, index = mix.locate(0, n)
    drawn = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    share = np.array(weights) / sum(weights) * np.arange(1, n + 1)[:, None]
    assert np.abs(drawn - share).max() < 1
    for number in range(len(weights)):  # its samples come one after the other, none left out
        own = index[source == number]
        assert own.tolist() == list(range(len(own)))


@given(
    weights=st.lists(st.floats(0.01, 5), min_size=1, max_size=4),
    first=st.integers(0, 2**60),
    cut=st.integers(0, 50),
)
def test_any_stretch_can_be_located_alone(weights: list[float], first: int, cut: int) -> None:
    mix = Interleave(weights)
    whole = mix.locate(first, 50)
    parts = [mix.locate(first, cut), mix.locate(first + cut, 50 - cut)]
    for joined, *pieces in zip(whole, *parts, strict=True):
        assert joined.tolist() == np.concatenate(pieces).tolist()


def test_decimals_are_exact_and_anything_else_is_near() -> None:
    assert Interleave([0.7, 0.2, 0.1]).turns.tolist() == [7, 2, 1]
    assert Interleave([1, 1]).turns.tolist() == [1, 1]
    assert Interleave([0.9999, 0.0001]).turns.tolist() == [9999, 1]
    assert Interleave([3.0]).turns.tolist() == [1]
    weights = [math.pi, math.e, 1e-9]
    turns = Interleave(weights).turns.tolist()
    assert sum(turns) == MAX_PERIOD
    assert min(turns) == 1
    shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    for turn, share in zip(turns, shares, strict=True):
        assert abs(Fraction(turn, MAX_PERIOD) - share) < Fraction(2, MAX_PERIOD)


def test_the_mix_is_this_one_on_every_machine() -> None:
    # A run resumed elsewhere must go on in the same order: these values may never change.
    source, index = Interleave([0.5, 0.3, 0.2]).locate(0, 10)
    assert source.tolist() == [0, 1, 0, 2, 0, 1, 0, 2, 1, 0]
    assert index.tolist() == [0, 0, 1, 0, 2, 1, 3, 1, 2, 4]
