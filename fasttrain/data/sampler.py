"""The order of samples: a keyed bijection, a pure function of (seed, epoch, index).

A Feistel network on the pair (x, y) = (i mod a, i div a) with a·b ≥ n alternately adds a hash of
one half to the other, modulo a or b; each round, and so the whole, is a bijection on [0, a·b). As
a·b < n + a, fewer than a values lie outside [0, n); those walk the permutation on until they are
inside, which leaves a bijection on [0, n). No table, no state: any index costs the same, at any
point of a run, on any number of ranks.

Sources: Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains" (unbalanced Feistel, cycle
walking); Steele, Lea & Flood 2014, "Fast Splittable Pseudorandom Number Generators" (the mixer).
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["Permutation", "sample_ids"]

ROUNDS = 8  # even, so that both halves are mixed alike; four already pass the suite's tests
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


class Permutation:
    """A bijection on [0, n), chosen by a key.

    Args:
        n: Size of the domain, 1 to 2**62.
        key: Any integer; each gives another order.
    """

    def __init__(self, n: int, key: int) -> None:
        if not 0 < n <= 2**62:
            raise ValueError(f"Permutation: n must be from 1 to 2**62, got {n}")
        self.n = n
        self._a = math.isqrt(n - 1) + 1
        self._b = -(-n // self._a)
        digest = hashlib.shake_256(f"fasttrain order {key}".encode()).digest(8 * ROUNDS)
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each of `indices` goes.

        Args:
            indices: Any shape, values in [0, n).

        Returns:
            int64 of the same shape, about 0.1 µs each.

        Raises:
            IndexError: A value is outside [0, n).
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and (int(indices.min()) < 0 or int(indices.max()) >= self.n):
            raise IndexError(f"Permutation: indices must be in [0, {self.n})")
        out = self._once(indices.astype(np.uint64).ravel())
        while (outside := np.flatnonzero(out >= self.n)).size:
            out[outside] = self._once(out[outside])
        return out.astype(np.int64).reshape(indices.shape)

    def _once(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        a, b = np.uint64(self._a), np.uint64(self._b)
        y, x = np.divmod(values, a)
        for number, key in enumerate(self._keys):
            if number % 2:
                y = (y + _mix(x, key) % b) % b
            else:
                x = (x + _mix(y, key) % a) % a
        return x + y * a


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """A hash of each value under a key, uniform on 64 bits."""
    z = values ^ key  # distinct values stay distinct: every step is a bijection
    z = (z ^ (z >> _SHIFTS[0])) * _MIX[0]
    z = (z ^ (z >> _SHIFTS[1])) * _MIX[1]
    return z ^ (z >> _SHIFTS[2])


def sample_ids(first: int, count: int, *, n: int, seed: int) -> NDArray[np.int64]:
    """Which sample each of a run's global sample indices is.

    Args:
        first: First global sample index, counted from 0 over the whole run.
        count: How many.
        n: Samples in an epoch.
        seed: Of the run.

    Returns:
        int64, shape (count,): for index i the sample that the order of epoch i // n puts at
        i mod n. Every sample comes exactly once an epoch.
    """
    if first < 0 or count < 0:
        raise ValueError(f"sample_ids: first and count must not be negative, got {first}, {count}")
    out = np.empty(count, np.int64)
    done = 0
    while done < count:
        epoch, at = divmod(first + done, n)
        part = min(count - done, n - at)
        # One integer of which (seed, epoch) can be read back: no two share a key.
        order = Permutation(n, (seed << 64) + epoch)
        out[done : done + part] = order.take(np.arange(at, at + part))
        done += part
    return out
