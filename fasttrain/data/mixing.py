"""Mixing several datasets: whose turn it is at any point of a run, in exact proportions.

The order is periodic: weights 0.5, 0.3 and 0.2 repeat every 10 samples. Within the period Tijdeman
1980, "The chairman assignment problem" (Discrete Mathematics 32) says whose turn it is: of those
that are due, the one whose turn may be put off least. After any number n of samples a dataset of
share w was drawn n·w times, with an error below one. Which dataset, and how many of its samples
came before, is looked up: no state, O(1) from any point on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interleave"]

# Four decimals are exact. Making the table takes 30 ms for three datasets.
MAX_PERIOD = 10_000


def _whole(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportions of `weights`, with a sum of at most `MAX_PERIOD`."""
    exact = [Fraction(str(weight)) for weight in weights]  # as written: 0.1 is a tenth
    common = math.lcm(*(f.denominator for f in exact))
    numbers = [int(f * common) for f in exact]
    divisor = math.gcd(*numbers)
    numbers = [n // divisor for n in numbers]
    total = sum(numbers)
    if total <= MAX_PERIOD:
        return numbers
    room = MAX_PERIOD - len(numbers)  # each gets at least one turn
    parts = [divmod(n * room, total) for n in numbers]
    left = room - sum(whole for whole, _ in parts)
    by_rest = sorted(range(len(parts)), key=lambda i: -parts[i][1])
    return [1 + whole + (i in by_rest[:left]) for i, (whole, _) in enumerate(parts)]


class Interleave:
    """Whose turn it is.

    Args:
        weights: Of each dataset, above 0; only their proportions count. Proportions that need a
            period of more than `MAX_PERIOD` samples are rounded to it.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or min(weights) <= 0:
            raise ValueError(f"Interleave: weights must be above 0, got {list(weights)}")
        self.turns = np.array(_whole(weights), np.int64)  # of each in one period
        turns: list[int] = self.turns.tolist()
        period, n = sum(turns), len(turns)
        slack = max(2 * n - 2, 1)
        common = math.lcm(*turns)
        done = [0] * n
        source, index = np.empty(period, np.int64), np.empty(period, np.int64)
        for t in range(period):
            # What each is owed at the end of this turn, times period·slack; due from `period` on.
            owed = [(turns[i] * (t + 1) - done[i] * period) * slack for i in range(n)]
            # The sooner its debt reaches slack − 1, the less its turn may be put off.
            _, chosen = min(
                (((slack - 1) * period - owed[i]) * (common // turns[i]), i)
                for i in range(n)
                if owed[i] >= period or n == 1
            )
            source[t], index[t] = chosen, done[chosen]
            done[chosen] += 1
        self._source, self._index = source, index

    def locate(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Dataset, and sample of that dataset, of `count` positions from `first` on.

        Returns:
            Two int64 arrays, shape (count,): the dataset, and how often it was drawn before.
        """
        periods, at = np.divmod(np.arange(first, first + count), len(self._source))
        source = self._source[at]
        return source, periods * self.turns[source] + self._index[at]
