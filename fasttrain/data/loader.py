"""Batches: windows of a split, in the order of the run, on the device before they are asked for.

A background thread reads windows with `pread` into a ring of buffers, ids as stored (2 or 4 bytes);
it makes no CUDA call, so that a graph may be captured meanwhile. `next()` widens them to int64: on
the CPU right into the tensors it returns (35 µs for 64 windows of 1,024; made ahead instead, 8
times the memory waits in the ring and is cold when it is used), on CUDA after it has issued the
copy of the batch after the one it returns, from pinned memory on a side stream.

Legend: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fasttrain.data.files import DataError
from fasttrain.data.format import TokenDataset
from fasttrain.data.sampler import sample_ids

__all__ = ["IGNORE", "Batch", "Loader", "evaluation_batches"]

IGNORE = -100  # the target of a position that the loss leaves out
ORDER_BLOCK = 4096  # samples whose order is computed at once: 0.1 µs each, 100 µs for one alone
HINT_AHEAD = 4  # batches of which the system is told ahead when reading is slow
SLOW_WINDOW_S = 50e-6  # a window from page cache takes 1 to 2 µs, one from a fast SSD 80


@dataclass(frozen=True, slots=True)
class Batch:
    """What one micro-batch trains on.

    Attributes:
        tokens: int64 ids, shape (B, T), contiguous, on the loader's device.
        targets: int64, shape (B, T), contiguous: the next token of each, or −100: left out.
        doc_starts: bool, shape (B, T), true at the first token of a document; None: rows are taken
            as one document.
        position: Global sample index after this batch; a loader built with it goes on from here.
        n_bytes: UTF-8 bytes of the targets' text, None where not known.
    """

    tokens: Tensor
    targets: Tensor
    doc_starts: Tensor | None
    position: int
    n_bytes: int | None


@dataclass(slots=True)
class _Slot:
    """A buffer of the ring, what is in it, and the event after which its copy to CUDA is done."""

    stored: Tensor  # (B, T + 1), ids as stored; pinned on CUDA
    position: int = 0  # as in Batch
    valid_rows: int = 0  # rows from here on lie beyond the end: no targets
    copied: torch.cuda.Event | None = None


class Loader:
    """Iterator over the training batches of one rank.

    Sample s of an epoch is the window tokens[s·T : s·T + T + 1], so each token is a target once an
    epoch. Row b of the m-th micro-batch from `position` on has the global sample index
    position + m·B·world_size + rank·B + b, which alone, with the seed, decides what it holds.

    Args:
        dataset: The split.
        seq_len: T.
        micro_batch: B.
        seed: Of the run's order.
        device: Where batches go.
        position: Global sample index to start from: the whole state of a loader.
        end: Global sample index to stop before; rows from it on have no targets. None: never.
        rank: Of this process.
        world_size: Processes that share the order.
        prefetch: Batches to hold ready, at least 1.
        deadline_s: A batch that takes longer to read ends the run, naming the file.

    Attributes:
        samples_per_epoch: Windows of the split.
        dropped_tokens: Tokens at the end of the split too few for a window.
        position: Global sample index after the batch returned last.
        wait_s: Seconds that `next()` has waited for the thread, in total.

    Raises:
        DataError: The split is shorter than one window. From `next()`: a file was truncated,
            replaced or cannot be read, or reading it takes longer than the deadline.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        seq_len: int,
        micro_batch: int,
        seed: int,
        device: torch.device | str,
        position: int = 0,
        end: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 4,
        deadline_s: float = 300.0,
    ) -> None:
        for name, value, least in (
            ("seq_len", seq_len, 1),
            ("micro_batch", micro_batch, 1),
            ("prefetch", prefetch, 1),
            ("position", position, 0),
        ):
            if value < least:
                raise ValueError(f"Loader: {name} must be at least {least}, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"Loader: rank must be in [0, {world_size}), got {rank}")
        self.samples_per_epoch = (dataset.n_tokens - 1) // seq_len
        if self.samples_per_epoch < 1:
            raise DataError(
                f"data.seq_len = {seq_len} is longer than the data: the split has "
                f"{dataset.n_tokens} tokens, {seq_len + 1} make one sample; shorten data.seq_len "
                f"to at most {max(dataset.n_tokens - 1, 0)} or add text"
            )
        self.dropped_tokens = dataset.n_tokens - 1 - self.samples_per_epoch * seq_len
        self.dataset, self.seq_len, self.micro_batch, self.seed = (
            dataset,
            seq_len,
            micro_batch,
            seed,
        )
        self.device = torch.device(device)
        self.position, self.end, self.rank, self.world_size = position, end, rank, world_size
        self.prefetch = prefetch
        self.wait_s = 0.0
        self.deadline_s = deadline_s
        # Simple queues, which are C; what bounds the thread is that there are so many slots.
        self._ready: queue.SimpleQueue[_Slot | BaseException | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._in_copy: list[_Slot] = []
        self._staged: tuple[Batch, torch.cuda.Event] | None = None
        self._over: BaseException | None = None
        self._slow = False
        self._stop = threading.Event()
        cuda = self.device.type == "cuda"
        if cuda:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        kind: torch.dtype = getattr(torch, dataset.dtype.name)
        for _ in range(prefetch + 1 + cuda):  # one more is being filled, and on CUDA one copied
            stored = torch.empty(micro_batch, seq_len + 1, dtype=kind, pin_memory=cuda)
            self._free.put(_Slot(stored))
        # A daemon, so that a hung read cannot keep the interpreter from ending; closed at exit,
        # because a daemon that is cut off inside torch's C++ aborts the process.
        atexit.register(self.close)
        self._thread = threading.Thread(
            target=self._fill, args=(position,), name="fasttrain-loader", daemon=True
        )
        self._thread.start()

    def sample_ids(self, first: int, count: int) -> NDArray[np.int64]:
        """Samples (window numbers of the split) of `count` global sample indices from `first`."""
        return sample_ids(first, count, n=self.samples_per_epoch, seed=self.seed)

    def at(self, position: int) -> Loader:
        """Another loader of the same samples in the same order, that starts at `position`."""
        return Loader(
            self.dataset,
            seq_len=self.seq_len,
            micro_batch=self.micro_batch,
            seed=self.seed,
            device=self.device,
            position=position,
            end=self.end,
            rank=self.rank,
            world_size=self.world_size,
            prefetch=self.prefetch,
            deadline_s=self.deadline_s,
        )

    # The background thread ------------------------------------------------------------------

    def _starts(self, position: int) -> Iterator[list[int]]:
        """First tokens of this rank's windows, micro-batch after micro-batch."""
        stride = self.micro_batch * self.world_size
        per_block = max(min(ORDER_BLOCK, self.samples_per_epoch) // stride, 1)
        mine = slice(self.rank * self.micro_batch, (self.rank + 1) * self.micro_batch)
        pending: list[list[int]] = []
        while True:
            ids = self.sample_ids(position, per_block * stride).reshape(per_block, stride)
            position += per_block * stride
            for row in (ids[:, mine] * self.seq_len).tolist():
                if self._slow:  # a hint costs as much as reading from page cache does
                    for start in row:
                        self.dataset.will_need(start, self.seq_len + 1)
                pending.append(row)
                if len(pending) > HINT_AHEAD:
                    yield pending.pop(0)

    def _fill(self, position: int) -> None:
        try:
            for starts in self._starts(position):
                if self.end is not None and position >= self.end:
                    return self._ready.put(None)
                slot = self._free.get()
                if slot is None:  # close()
                    return
                slot.valid_rows = self.micro_batch
                if self.end is not None:
                    left = self.end - position - self.rank * self.micro_batch
                    slot.valid_rows = min(max(left, 0), self.micro_batch)
                position += self.micro_batch * self.world_size
                slot.position = position
                self._read(starts, slot.stored.numpy())
                self._ready.put(slot)
                if self._stop.is_set():
                    return
        except BaseException as error:  # next() raises it where it can be handled
            self._ready.put(error)

    def _read(self, starts: list[int], out: NDArray[Any]) -> None:
        begin = time.perf_counter()
        self.dataset.read_windows(starts, out)
        self._slow = time.perf_counter() - begin > SLOW_WINDOW_S * len(starts)

    # The consumer ---------------------------------------------------------------------------

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self.device.type != "cuda":
            slot = self._get()
            self.position = slot.position
            tokens, targets = _widen(slot.stored.numpy(), slot.valid_rows)
            self._free.put(slot)
            return Batch(tokens, targets, None, self.position, None)
        batch, copied = self._staged or self._stage(self._get())
        self._staged = None
        if not self._ready.empty() and self._over is None:
            # An end or an error is kept: the next call raises it, this batch is good.
            with contextlib.suppress(StopIteration, DataError):
                self._staged = self._stage(self._get())
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        batch.tokens.record_stream(current)  # allocated on the side stream, freed on this one
        batch.targets.record_stream(current)
        self.position = batch.position
        return batch

    def _get(self) -> _Slot:
        """The next filled slot; waits for it, and measures the wait."""
        if self._over is not None:
            raise self._over
        begin = time.perf_counter()
        try:
            item = self._ready.get(timeout=self.deadline_s)
        except queue.Empty:
            file = self.dataset.reading or "the dataset"
            item = DataError(
                f"{file}: reading a batch has taken {self.deadline_s:g} s; the disk or network "
                "that holds it hangs. Resume from the last checkpoint once it answers"
            )
        self.wait_s += time.perf_counter() - begin
        if isinstance(item, _Slot):
            return item
        self._over = StopIteration() if item is None else item
        raise self._over

    def _stage(self, slot: _Slot) -> tuple[Batch, torch.cuda.Event]:
        """Starts the copy of a filled slot to the device."""
        with torch.cuda.stream(self._stream):
            stored = slot.stored.to(self.device, non_blocking=True)
            slot.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            slot.copied.record(self._stream)
            ids = stored.to(torch.int64)
            tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
            if slot.valid_rows < self.micro_batch:
                targets[slot.valid_rows :] = IGNORE
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        self._in_copy.append(slot)
        # The copy issued a step ago is long done; only that one is waited for, never this one.
        while len(self._in_copy) > 1:
            earlier = self._in_copy.pop(0)
            assert earlier.copied is not None
            earlier.copied.synchronize()
            self._free.put(earlier)
        return Batch(tokens, targets, None, slot.position, None), done

    def close(self) -> None:
        """Ends the thread; the loader gives no more batches. May be called again."""
        atexit.unregister(self.close)
        self._stop.set()
        self._over = self._over or StopIteration()
        self._free.put(None)
        self._thread.join(timeout=5.0)  # a hung read does not hold up the end of the run
        self._staged = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _widen(stored: NDArray[Any], valid_rows: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets, fresh int64 tensors (B, T), of windows (B, T + 1) as stored."""
    rows, length = stored.shape
    tokens = torch.empty(rows, length - 1, dtype=torch.int64)
    targets = torch.empty_like(tokens)
    tokens.numpy()[:] = stored[:, :-1]
    targets.numpy()[:] = stored[:, 1:]
    if valid_rows < rows:
        targets[valid_rows:] = IGNORE
    return tokens, targets


def evaluation_batches(
    dataset: TokenDataset,
    *,
    seq_len: int,
    batch_size: int,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """The whole split once, in order: every token but the first is a target exactly once.

    Every rank gets the same number of batches of the same shape; what lies beyond the end of the
    split is token 0 with target −100.

    Args:
        dataset: The split.
        seq_len: T.
        batch_size: B, rows of one rank's batch.
        device: Where batches go.
        rank: Of this process: it takes every world_size-th batch.
        world_size: Processes that share the split.

    Returns:
        Iterator of batches; `position` counts windows.

    Raises:
        DataError: The split has fewer than two tokens. While iterating: a file was truncated,
            replaced or cannot be read.
    """
    if dataset.n_tokens < 2:
        raise DataError(
            f"a validation split of {dataset.n_tokens} tokens has nothing to predict; prepare it "
            "with a larger --val-fraction"
        )
    device = torch.device(device)
    n_windows = -(-(dataset.n_tokens - 1) // seq_len)
    stride = batch_size * world_size
    return (
        _evaluation_batch(dataset, first + rank * batch_size, seq_len, batch_size, device)
        for first in range(0, n_windows, stride)
    )


def _evaluation_batch(
    dataset: TokenDataset, first: int, seq_len: int, batch_size: int, device: torch.device
) -> Batch:
    """Windows first … first + batch_size − 1 of the split, padded."""
    begin = min(first * seq_len, dataset.n_tokens - 1)
    count = min(batch_size * seq_len, dataset.n_tokens - 1 - begin)
    stored = dataset.read(begin, count + 1)
    tokens = torch.zeros(batch_size * seq_len, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORE)
    tokens.numpy()[:count] = stored[:-1]
    targets.numpy()[:count] = stored[1:]
    if device.type == "cuda":
        tokens, targets = tokens.pin_memory(), targets.pin_memory()
    shape = (batch_size, seq_len)
    return Batch(
        tokens.view(shape).to(device, non_blocking=True),
        targets.view(shape).to(device, non_blocking=True),
        None,
        first + batch_size,
        None,
    )
