"""Gathering pieces of memory in one call, and what becomes of pieces that are no longer there."""

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from fasttrain.data import shards as gather_module
from fasttrain.data.shards import MAX_PIECES, gather


@pytest.mark.parametrize("n", [0, 1, 70, MAX_PIECES, 2 * MAX_PIECES + 3])
def test_all_pieces_arrive_whatever_their_number_and_size(n: int) -> None:
    rng = np.random.default_rng(n)
    source = rng.integers(0, 256, 100_000, np.uint8)
    starts, sizes = rng.integers(0, 99_000, n), rng.integers(1, 900, n)
    out = np.zeros((n, 900), np.uint8)
    assert gather(source.ctypes.data + starts, out.ctypes.data + 900 * np.arange(n), sizes)
    for row, start, size in zip(out, starts, sizes, strict=True):
        assert np.array_equal(row[:size], source[start : start + size])
        assert not row[size:].any()


@pytest.mark.parametrize("n", [1, 64, 2 * MAX_PIECES + 3])
def test_pieces_of_one_size_go_side_by_side(n: int) -> None:
    rng = np.random.default_rng(n)
    source, starts = rng.integers(0, 256, 100_000, np.uint8), rng.integers(0, 99_000, n)
    out = np.zeros((n + 1, 900), np.uint8)
    assert gather(source.ctypes.data + starts, out.ctypes.data, 900)
    assert np.array_equal(out[:n], source[starts[:, None] + np.arange(900)])
    assert not out[n].any()


def test_R23_pieces_of_a_truncated_file_are_a_false_not_a_signal(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 256)
    out = np.zeros((2, 100), np.uint8)
    addresses, sizes = out.ctypes.data + np.array([0, 100]), np.array([100, 100])
    with path.open("rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    starts = np.array([10, 50_000])
    assert gather(mapped.ctypes.data + starts, addresses, sizes)
    os.truncate(path, 5000)
    assert not gather(mapped.ctypes.data + starts, addresses, sizes)
    assert not gather(mapped.ctypes.data + starts[1:], addresses[1:], sizes[1:])
    assert gather(mapped.ctypes.data + starts[:1], addresses[:1], sizes[:1])


def test_without_the_call_nothing_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather_module, "_process_vm_readv", lambda: None)
    one = np.array([0])
    assert not gather(one, one, one)
