"""The loader against other ways to cut random windows of tokens out of a file in page cache.

100M uint16 tokens, batches of 64 windows of 1,025, each way ending at int64 tokens and targets of
shape (64, 1024). The loader's order, a keyed permutation, and its handing over from another thread
are part of its time; the others but DataLoader get their positions for nothing.

    raw slicing   a memmap's slices copied into one array, converted once
    get_batch     as in nanoGPT: the memmap opened for the batch, each row converted and wrapped
                  alone, then stacked twice
    DataLoader    torch's, over a memmap dataset, in this process and with two workers
"""

from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fasttrain.data.format import open_dataset
from fasttrain.data.loader import Loader

N_TOKENS, VOCAB_SIZE = 100_000_000, 50_257
BATCH, LENGTH = 64, 1024
N_CALLS, ROUNDS = 400, 10  # calls in a timing: what was prefetched before it is 4 % of them
Tokens = np.memmap[Any, np.dtype[np.uint16]]


class Windows(Dataset[Tensor]):
    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // LENGTH

    def __getitem__(self, index: int) -> Tensor:
        window = self.tokens[index * LENGTH : index * LENGTH + LENGTH + 1]
        return torch.from_numpy(window.astype(np.int64))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, N_TOKENS, dtype=np.uint16)
    tokens.tofile(tmp_path / "train.bin")
    return tmp_path


def starts() -> Iterator[list[int]]:
    order = np.random.default_rng(1).permutation((N_TOKENS - 1) // LENGTH)
    order = order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)
    return cycle((order * LENGTH).tolist())


def raw_slicing(tokens: Tokens) -> Callable[[], tuple[Tensor, Tensor]]:
    positions = starts()
    windows = np.empty((BATCH, LENGTH + 1), np.uint16)

    def batch() -> tuple[Tensor, Tensor]:
        for row, start in enumerate(next(positions)):
            windows[row] = tokens[start : start + LENGTH + 1]
        ids = torch.from_numpy(windows.astype(np.int64))
        return ids[:, :-1], ids[:, 1:]

    return batch


def get_batch(path: Path) -> Callable[[], tuple[Tensor, Tensor]]:
    positions = starts()

    def rows(tokens: Tokens, offset: int, chosen: list[int]) -> Tensor:
        parts = (tokens[s + offset : s + offset + LENGTH].astype(np.int64) for s in chosen)
        return torch.stack([torch.from_numpy(part) for part in parts])

    def batch() -> tuple[Tensor, Tensor]:
        chosen = next(positions)
        tokens = np.memmap(path, np.uint16, "r")
        return rows(tokens, 0, chosen), rows(tokens, 1, chosen)

    return batch


def data_loader(tokens: Tokens, workers: int) -> Callable[[], tuple[Tensor, Tensor]]:
    loader = DataLoader(Windows(tokens), BATCH, shuffle=True, drop_last=True, num_workers=workers)

    def forever() -> Iterator[Tensor]:
        while True:
            yield from loader

    windows = forever()

    def batch() -> tuple[Tensor, Tensor]:
        ids = next(windows)
        return ids[:, :-1], ids[:, 1:]

    return batch


def test_random_windows(folder: Path, compare: Any, benchmark: Any) -> None:
    dataset = open_dataset(
        folder, "train", dtype="uint16", vocab_size=VOCAB_SIZE, cache_dir=folder / "cache"
    )
    tokens = np.memmap(folder / "train.bin", np.uint16, "r")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each way converts on one core
    try:
        with Loader(dataset, seq_len=LENGTH, micro_batch=BATCH, seed=0, device="cpu") as loader:
            result = compare(
                {
                    "fasttrain": lambda: next(loader),
                    "raw slicing": raw_slicing(tokens),
                    "get_batch": get_batch(folder / "train.bin"),
                    "DataLoader": data_loader(tokens, 0),
                    "DataLoader, 2 workers": data_loader(tokens, 2),
                },
                rounds=ROUNDS,
                n_calls=N_CALLS,
            )
    finally:
        torch.set_num_threads(threads)
    rates = {name: BATCH * LENGTH / seconds for name, seconds in result.median_s.items()}
    benchmark.extra_info["tokens_per_s"] = rates
    for name, rate in rates.items():
        ratio = result.speedup.get(name, 1.0)
        print(f"{name:22} {rate / 1e6:6.0f}M tokens/s   fasttrain is {ratio:.2f} times as fast")
    assert result.speedup["DataLoader"] > 1
