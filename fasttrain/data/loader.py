"""Batches: rows of a split, in the order of the run, on the device before they are asked for.

A background thread reads rows into a ring of buffers, ids as stored (2 or 4 bytes); it makes no
CUDA call, so that a graph may be captured meanwhile. `next()` widens them to int64 (made ahead, 8
times the memory would wait in the ring, cold when it is used); on CUDA it copies them first, from
pinned memory on a side stream, one batch ahead of the one that it returns.

A buffer holds several batches, read by one call: to hand a batch to another thread takes as long as
to read it from page cache (0.1 ms each; 16 ahead, 8 at a time, give 1.9 times the tokens a second).

Legend: B rows of a batch, T tokens of a row.
"""

import atexit
import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from fasttrain.data.dataset import Array, Shard, TokenDataset
from fasttrain.data.order import LoaderOptions, SampleOrder, document_rows, document_starts
from fasttrain.data.remote import RemoteShard, ShardCache
from fasttrain.storage import DataError

ORDER_BLOCK = 4096  # samples whose order is computed at once: 0.1 µs each, 100 µs for one alone
DEADLINE_S = 300.0  # batches that take longer to read end the run, naming the file
AHEAD = 16  # half rings of batches whose shards are fetched while the ring is full
IGNORE_INDEX = -100  # the target of a position that the loss leaves out


@dataclass(frozen=True, slots=True)
class Batch:
    """What one micro-batch trains on."""

    tokens: Tensor  # int64 (B, T), contiguous, on the loader's device
    targets: Tensor  # int64 (B, T), contiguous: the next token of each, or IGNORE_INDEX
    doc_starts: Tensor | None  # bool (B, T), true at a document's first token; None: not marked
    position: int  # global sample index after this batch; a loader built with it continues here
    n_tokens: int = 0  # targets in it and in the same micro-batch of other ranks; 0: not counted

    def cut(self, length: int) -> Self:
        """The same targets, each row (of a multiple of `length` tokens) in pieces, as views."""
        return self.map(lambda tensor: tensor.view(-1, length))

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a batch of what `change` makes of each tensor."""
        starts = None if self.doc_starts is None else change(self.doc_starts)
        tokens, targets = change(self.tokens), change(self.targets)
        return replace(self, tokens=tokens, targets=targets, doc_starts=starts)


class Stored(NamedTuple):
    """Rows as they are stored: a buffer for those of K batches, or a batch in its part of one."""

    ids: Tensor  # uint16 or uint32, (rows, T + 1 or more)
    n_targets: Tensor  # int64 (rows); what follows in a row is padding
    doc_starts: Tensor | None  # as in Batch
    # Of a batch
    length: int = 0  # T
    padded: bool = False  # whether any row has padding
    position: int = 0  # as in Batch
    n_tokens: int = 0  # as in Batch
    buffer: "Stored | None" = None  # what can be filled again after it; None: more batches follow

    def batch(self) -> Batch:
        """Return it in fresh tensors; padding is token 0 without target."""
        parts = self.ids[:, : self.length], self.ids[:, 1 : self.length + 1]
        tokens, targets = (part.to(torch.int64) for part in parts)
        if self.padded:
            beyond = torch.arange(self.length, device=tokens.device) >= self.n_targets[:, None]
            targets.masked_fill_(beyond, IGNORE_INDEX)
            tokens.masked_fill_(beyond, 0)
        return Batch(tokens, targets, self.doc_starts, self.position, self.n_tokens)


class Loader(contextlib.AbstractContextManager["Loader"], Iterator[Batch]):
    """Iterator over the training batches of one rank.

    Row b of the m-th micro-batch from `position` on has the global sample index
    position + m·B·world_size + rank·B + b, which alone, with the seed, decides what it holds (see
    order.py). All batches have T = `seq_len`, but bucketed ones, which may be shorter.

    Raises:
        DataError: The split has no sample, or its documents are not known. From `next()`: a file
            was truncated, replaced or cannot be read, or reading it takes longer than the deadline.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        options: LoaderOptions,
        *,
        device: torch.device | str,
        position: int = 0,
    ) -> None:
        self.dataset, self.options, self.device = dataset, options, torch.device(device)
        self.position = position  # global sample index after the batch returned last: all its state
        self.order = SampleOrder(dataset, options)
        self.sample_ids, self.samples_per_epoch = self.order.ids, self.order.samples_per_epoch
        marked = options.separate_documents and options.of_windows
        self._ends = dataset.document_ends if marked else None
        self.end: int | None = None  # sample index to stop before; rows from it on have no targets
        if options.epochs is not None:
            self.end = math.ceil(options.epochs * self.samples_per_epoch)
        self.wait_s = 0.0  # that next() has waited for the thread, in total
        remote = (s.cache for s in dataset.shards if isinstance(s, RemoteShard))
        self._cache: ShardCache | None = next(remote, None)
        # Simple queues, which are C; what bounds the thread is that there are so many buffers.
        self._ready: queue.SimpleQueue[Stored | BaseException] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[Stored | None] = queue.SimpleQueue()
        self._in_copy: tuple[Stored, torch.cuda.Event] | None = None  # free after the event
        self._staged: tuple[Batch, torch.cuda.Event] | None = None
        self._over: BaseException | None = None
        cuda = self.device.type == "cuda"
        if cuda:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._per_buffer = max(options.prefetch // 2, 1)
        n_rows, seq_len = self._per_buffer * options.micro_batch, options.seq_len
        empty = partial(torch.empty, pin_memory=cuda)
        kind: torch.dtype = getattr(torch, dataset.dtype.name)
        # One more is being filled, and on CUDA one copied.
        for _ in range(-(-options.prefetch // self._per_buffer) + 1 + cuda):
            ids = empty(n_rows, seq_len + 1, dtype=kind)
            starts = empty(n_rows, seq_len, dtype=torch.bool) if marked else None
            self._free.put(Stored(ids, empty(n_rows, dtype=torch.int64), starts))
        # A daemon, so that a hung read cannot keep the interpreter from ending; closed at exit,
        # because a daemon that is cut off inside torch's C++ aborts the process.
        atexit.register(self.close)
        self._thread = threading.Thread(target=self._fill, name="fasttrain-loader", daemon=True)
        self._thread.start()

    def at(self, position: int) -> "Loader":
        """Another loader of the same samples in the same order, starting at `position`."""
        return Loader(self.dataset, self.options, device=self.device, position=position)

    def _contents(self) -> Iterator[tuple[Array, Array, list[tuple[Any, ...]], list[Shard]]]:
        """Yield, to the end of the run, what one buffer after the other is to hold.

        First token and number of tokens of this rank's rows in its batches; of each batch what
        `Stored` says of it; where there are remote shards, those of the rows.
        """
        options, position, shards = self.options, self.position, list[Shard]()
        rows, stride = options.micro_batch, options.micro_batch * options.world_size
        mine, lengths = slice(options.rank * rows, (options.rank + 1) * rows), options.lengths
        per_buffer = stride * self._per_buffer
        n_buffers = max(min(ORDER_BLOCK, self.samples_per_epoch) // per_buffer, 1)
        while True:
            found = self.order.rows(position, n_buffers * per_buffer)
            starts, counts = (array.reshape(n_buffers, -1, stride) for array in found)
            length = np.array(lengths)[np.searchsorted(lengths, counts[..., mine].max(2) - 1)]
            if self.end is not None:  # no row behind it has a target
                counts.flat[max(self.end - position, 0) :] = 1
            n_tokens, starts, counts = (counts - 1).sum(2), starts[..., mine], counts[..., mine]
            padded = counts.min(2) <= length
            after = position + stride * np.arange(1, n_tokens.size + 1).reshape(n_tokens.shape)
            for k, n in enumerate(np.count_nonzero(n_tokens, axis=1).tolist()):
                if not n:
                    return
                start, count = starts[k, :n].ravel(), counts[k, :n].ravel()
                if self._cache:
                    shards = self.dataset.shards_of(start, start + count)
                facts = (array[k, :n].tolist() for array in (length, padded, after, n_tokens))
                yield start, count, list(zip(*facts, strict=True)), shards
            position += n_buffers * per_buffer

    def _fill(self) -> None:
        """Read batches, in the thread, until the run's end, an error or `close`."""
        contents, rows = self._contents(), self.options.micro_batch
        try:
            coming = deque(islice(contents, 1 + (AHEAD if self._cache else 0)))
            while coming:
                if self._cache:
                    self._cache.fetch_ahead(chain.from_iterable(shards for *_, shards in coming))
                starts, counts, batches, _ = coming.popleft()
                buffer = self._free.get()
                if buffer is None or self._over is not None:  # close()
                    return
                n = len(starts)
                self.dataset.read_windows(starts, buffer.ids.numpy()[:n], counts)
                buffer.n_targets.numpy()[:n] = counts - 1
                if self._ends is not None and (marks := buffer.doc_starts) is not None:
                    marks.numpy()[:n] = document_starts(self._ends, starts, marks.shape[1])
                for k, facts in enumerate(batches):
                    here = slice(k * rows, (k + 1) * rows)
                    marks = None if buffer.doc_starts is None else buffer.doc_starts[here]
                    batch = Stored(buffer.ids[here], buffer.n_targets[here], marks, *facts)
                    last = k + 1 == len(batches)
                    self._ready.put(batch._replace(buffer=buffer) if last else batch)
                coming.extend(islice(contents, 1))
            self._ready.put(StopIteration())
        except BaseException as error:  # next() raises it where it can be handled
            self._ready.put(error)
        finally:
            if self._cache:
                self._cache.fetch_ahead([])

    def __next__(self) -> Batch:
        if self.device.type != "cuda":
            stored = self._get()
            if (marks := stored.doc_starts) is not None:
                stored = stored._replace(doc_starts=marks.clone())
            batch = stored.batch()
            if stored.buffer is not None:
                self._free.put(stored.buffer)
        else:
            batch, copied = self._staged or self._stage(self._get())
            self._staged = None
            if not self._ready.empty() and self._over is None:
                # An end or an error is kept: the next call raises it, this batch is good.
                with contextlib.suppress(StopIteration, DataError):
                    self._staged = self._stage(self._get())
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            for tensor in (batch.tokens, batch.targets, batch.doc_starts):
                if tensor is not None:  # allocated on the side stream, freed on this one
                    tensor.record_stream(current)
        self.position = batch.position
        return batch

    def _get(self) -> Stored:
        """The next batch. Waits for it, and measures the wait."""
        if self._over is not None:
            raise self._over
        begin, item = time.perf_counter(), None
        waited_s, progress = 0.0, self._cache.progress if self._cache else 0
        while item is None:
            try:
                # In short waits: time in which the process was stopped counts as one of them.
                item = self._ready.get(timeout=(pause_s := min(DEADLINE_S, 1.0)))
            except queue.Empty:
                waited_s += pause_s
                if self._cache and self._cache.progress > progress:
                    # The network is slow, and does not hang.
                    waited_s, progress = 0.0, self._cache.progress
                if waited_s < DEADLINE_S:
                    continue
                file = self.dataset.reading or "the dataset"
                item = DataError(
                    f"{file}: reading a batch has taken {DEADLINE_S:g} s; the disk or network "
                    "that holds it hangs. Resume from the last checkpoint once it answers"
                )
        self.wait_s += time.perf_counter() - begin
        if isinstance(item, BaseException):
            self._over = item
            raise item
        return item

    def _stage(self, stored: Stored) -> tuple[Batch, torch.cuda.Event]:
        """Starts the copy of a batch to the device."""
        copied, done = (torch.cuda.Event() for _ in range(2))  # type: ignore[no-untyped-call]
        copy = partial(torch.Tensor.to, device=self.device, non_blocking=True)
        with torch.cuda.stream(self._stream):
            marks = None if stored.doc_starts is None else copy(stored.doc_starts)
            there = Stored(copy(stored.ids), copy(stored.n_targets), marks, *stored[3:])
            copied.record(self._stream)
            batch = there.batch()
            done.record(self._stream)
        # The copy issued a step ago is long done; only that one is waited for, never this one.
        if self._in_copy is not None:
            free, event = self._in_copy
            event.synchronize()
            self._free.put(free)
        self._in_copy = None if stored.buffer is None else (stored.buffer, copied)
        return batch, done

    def close(self) -> None:
        """Ends the thread; the loader gives no more batches. May be called again."""
        atexit.unregister(self.close)
        self._over = self._over or StopIteration()
        self._free.put(None)
        self._thread.join(timeout=5.0)  # a hung read does not hold up the end of the run
        self._staged = None

    def __exit__(self, *_: object) -> None:
        self.close()


def evaluation_batches(
    dataset: TokenDataset,
    options: LoaderOptions,
    device: torch.device | str,
    *,
    n_tokens: int | None = None,
) -> Iterator[Batch]:
    """The split once, or as many of its rows, evenly spread, as make ``n_tokens`` targets.

    Packed and sliding: windows side by side, or overlapping where `stride_tokens` is set, and of
    all but the first only the last `stride_tokens` are targets: they see at least the T −
    `stride_tokens` tokens before them. Either way every token but the first is a target once.
    Padded and bucketed: documents, the long ones in pieces of T, so that every token but the first
    of each document is a target once; bucketed in order of their length, others as they lie.
    Every rank gets the same number of batches, every world_size-th; what lies beyond the rows is
    token 0 with target −100. `position` counts rows. A file may turn out damaged while iterating.
    """
    seq_len, batch_size = options.seq_len, options.micro_batch
    ends, n_seen = None, 0  # tokens of a window that were targets of the one before
    if options.of_windows:
        n_seen = seq_len - (options.stride_tokens or seq_len)
        end = dataset.n_tokens - 1
        starts = np.arange(0, max(end - n_seen, min(end, 1)), seq_len - n_seen)
        counts = np.minimum(dataset.n_tokens - starts, seq_len + 1)
        ends = dataset.document_ends if options.separate_documents else None
    else:
        starts, counts = document_rows(dataset, seq_len)
    if not len(starts):
        problem = f"a validation split of {dataset.n_tokens} tokens has nothing to predict"
        raise DataError(f"{problem}; prepare it with a larger --val-fraction")
    n_targets = int(counts.sum()) - len(counts) * (1 + n_seen)
    if n_tokens is not None and n_tokens < n_targets:
        n_rows = math.ceil(len(starts) * n_tokens / n_targets)
        chosen = np.arange(n_rows) * len(starts) // n_rows  # every k-th row, k a fraction
        starts, counts = starts[chosen], counts[chosen]
    if options.batching == "bucketed":
        by_length = np.argsort(counts, kind="stable")
        starts, counts = starts[by_length], counts[by_length]
    stride = batch_size * options.world_size
    beyond = (0, -len(starts) % stride)
    starts, counts = np.pad(starts, beyond, "edge"), np.pad(counts, beyond, constant_values=1)

    def batch(first: int) -> Batch:
        start, count = starts[first : first + batch_size], counts[first : first + batch_size]
        length = next(n for n in options.lengths if n >= count.max() - 1)
        ids = np.zeros((batch_size, length + 1), dataset.dtype)
        dataset.read_windows(start, ids, count)
        marks = None if ends is None else torch.from_numpy(document_starts(ends, start, length))
        n_targets, end = torch.from_numpy(count - 1), first + batch_size
        found = Stored(torch.from_numpy(ids), n_targets, marks, length, True, end).batch()
        found.targets[torch.from_numpy(start > 0), :n_seen] = IGNORE_INDEX
        if torch.device(device).type == "cuda":
            return found.map(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))
        return found

    return (batch(at) for at in range(options.rank * batch_size, len(starts), stride))
