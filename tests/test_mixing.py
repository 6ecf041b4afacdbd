"""Mixing: exact shares at every point, each dataset's samples in sequence, from any point on."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasttrain.data.order import MAX_PERIOD, Interleave


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


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [-1.0, 2.0]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights must be above 0"):
        Interleave(weights)
