"""The loader against other ways to cut random windows of tokens out of a file in page cache.

100M uint16 tokens, batches of 64 windows of 1,025, each way ending at int64 tokens and targets of
shape (64, 1024). The loader's order, a keyed permutation, and its handing over from another thread
are part of its time; the others but DataLoader and litdata, shuffled, get their positions for
nothing.

    raw slicing        a memmap's slices copied into one array, converted once
    get_batch          as in nanoGPT: the memmap opened for the batch, each row converted and
                       wrapped alone, then stacked twice
    DataLoader         torch's, over a memmap dataset, in this process and with two workers
    datatrove          windows of its DatatroveFileDataset at random; and in the file's order, which
                       it is made for (its files are shuffled when they are written)
    litdata            its TokensLoader over the same tokens as one chunk, so that none is ever
                       opened again: windows by number, and by its own shuffled iteration
    MosaicML streaming a local StreamingDataset of windows as bytes, by number, which is faster than
                       iterating over it; 20,000 windows, because writing them takes long

The extra `peers` leaves two out: litdata, because it requires a torchvision that torch for CPUs
cannot load, and mosaicml-streaming, because of numpy<2.2 and transformers<5. They take part after
``pip install --no-deps --target FOLDER``, with what they need, where PYTHONPATH has that folder.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, cycle, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.harness import OURS, gather
from benchmarks.steps import dataset_of
from fasttrain.data.loader import Loader
from fasttrain.data.order import LoaderOptions

N_TOKENS, VOCAB_SIZE = 100_000_000, 50_257
BATCH, LENGTH = 64, 1024
N_CALLS = 256  # in a timing: what was prefetched before it is 6 % of them
N_SAMPLES = 20_000  # of MosaicML streaming
Tokens = np.memmap[Any, np.dtype[np.uint16]]
Pair = tuple[Tensor, Tensor]
Way = Callable[[], Pair]


def at_random(n: int) -> Iterator[list[int]]:
    order = np.random.default_rng(1).permutation(n)
    return cycle(order[: n // BATCH * BATCH].reshape(-1, BATCH).tolist())


def split(ids: Tensor) -> Pair:
    return ids[:, :-1], ids[:, 1:]


def stacked(windows: Iterable[Any]) -> Pair:
    return split(torch.from_numpy(np.stack(list(windows)).astype(np.int64)))


class Windows:
    """A dataset for DataLoader, and what raw slicing slices."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // LENGTH

    def slice(self, index: int) -> np.ndarray:
        return self.tokens[index * LENGTH : index * LENGTH + LENGTH + 1]

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.slice(index).astype(np.int64))


def by_number(dataset: Any, window_of: Callable[[Any], Any]) -> Way:
    """Return batches of a dataset's items at random."""
    batches = at_random(len(dataset))
    return lambda: stacked(window_of(dataset[index]) for index in next(batches))


def raw_slicing(windows: Windows) -> Way:
    batches = at_random(len(windows))
    rows = np.empty((BATCH, LENGTH + 1), np.uint16)

    def batch() -> Pair:
        for row, index in enumerate(next(batches)):
            rows[row] = windows.slice(index)
        return split(torch.from_numpy(rows.astype(np.int64)))

    return batch


def get_batch(path: Path) -> Way:
    batches = at_random((N_TOKENS - 1) // LENGTH)

    def rows(tokens: Tokens, starts: list[int]) -> Tensor:
        parts = (tokens[s : s + LENGTH].astype(np.int64) for s in starts)
        return torch.stack([torch.from_numpy(part) for part in parts])

    def batch() -> Pair:
        starts = [index * LENGTH for index in next(batches)]
        tokens = np.memmap(path, np.uint16, "r")
        return rows(tokens, starts), rows(tokens, [s + 1 for s in starts])

    return batch


def data_loader(dataset: Any, workers: int) -> Way:
    loader = DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=workers)
    windows = chain.from_iterable(repeat(loader))
    return lambda: split(next(windows))


def datatrove(path: Path, *, in_order: bool) -> Way:
    from datatrove.utils.dataset import DatatroveFileDataset

    dataset = DatatroveFileDataset(str(path), LENGTH, token_size=2)
    in_turn = cycle([range(b * BATCH, (b + 1) * BATCH) for b in range(len(dataset) // BATCH)])
    batches: Iterator[Iterable[int]] = in_turn if in_order else at_random(len(dataset))
    return lambda: split(torch.stack([dataset[index]["input_ids"] for index in next(batches)]))


def litdata(tokens: Tokens, folder: Path, *, iterated: bool) -> Way:
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")  # it would ask the network
    from litdata import StreamingDataset, TokensLoader, optimize

    def all_tokens(_: int) -> Iterator[Any]:
        yield np.array(tokens)

    if not folder.exists():
        optimize(
            fn=all_tokens, inputs=[0], output_dir=str(folder),
            chunk_size=2 * N_TOKENS, item_loader=TokensLoader(), num_workers=1,
            start_method="fork",
        )  # fmt: skip
    loader = TokensLoader(LENGTH + 1)
    dataset = StreamingDataset(str(folder), item_loader=loader, shuffle=True, drop_last=True)
    if not iterated:
        return by_number(dataset, lambda window: window)
    windows = chain.from_iterable(repeat(dataset))
    return lambda: stacked(islice(windows, BATCH))


def mosaicml_streaming(windows: Windows, folder: Path) -> Way:
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(folder), columns={"tokens": "bytes"}) as writer:
        for index in range(N_SAMPLES):
            writer.write({"tokens": windows.slice(index).tobytes()})
    dataset = StreamingDataset(local=str(folder), batch_size=BATCH, shuffle=True)
    return by_number(dataset, lambda item: np.frombuffer(item["tokens"], np.uint16))


def test_random_windows(tmp_path: Path, compare: Any) -> None:
    file = tmp_path / "train.bin"
    random = np.random.default_rng(0).integers(0, VOCAB_SIZE, N_TOKENS, dtype=np.uint16)
    dataset = dataset_of(tmp_path, random, VOCAB_SIZE)
    tokens = np.memmap(file, np.uint16, "r")
    windows = Windows(tokens)
    makers = {
        "raw slicing": partial(raw_slicing, windows),
        "get_batch": partial(get_batch, file),
        "DataLoader": partial(data_loader, windows, 0),
        "DataLoader, 2 workers": partial(data_loader, windows, 2),
        "datatrove": partial(datatrove, file, in_order=False),
        "datatrove, in order": partial(datatrove, file, in_order=True),
        "litdata": partial(litdata, tokens, tmp_path / "litdata", iterated=False),
        "litdata, shuffled": partial(litdata, tokens, tmp_path / "litdata", iterated=True),
        "MosaicML streaming": partial(mosaicml_streaming, windows, tmp_path / "mds"),
    }
    starts = np.arange(N_TOKENS // LENGTH - 1)[:, None] * [LENGTH, LENGTH + 1]
    starts = starts[starts < N_TOKENS - LENGTH]
    first = tokens[starts]

    def check(name: str, batch: Way) -> None:
        """Hold that a batch has windows of the file and their next tokens, as int64."""
        inputs, targets = batch()
        assert (inputs.shape, inputs.dtype) == ((BATCH, LENGTH), torch.int64), name
        assert torch.equal(inputs[:, 1:], targets[:, :-1]), name
        for row in np.concatenate([inputs, targets[:, -1:]], axis=1):
            found = starts[first == row[0]]
            assert any((tokens[s : s + LENGTH + 1] == row).all() for s in found), name

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each way converts on one core
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the peers' own
            rivals, left_out = gather(makers, check)
            options = LoaderOptions(seq_len=LENGTH, micro_batch=BATCH)
            with Loader(dataset, options, device="cpu") as loader:
                check(OURS, lambda: ((batch := next(loader)).tokens, batch.targets))
                ways = {OURS: lambda: next(loader), **rivals}
                rates = {"tokens_per_s": BATCH * LENGTH}
                compare(ways, n_calls=N_CALLS, left_out=left_out, per_call=rates)
    finally:
        torch.set_num_threads(threads)
