"""Splits, and encoding in several processes whose number changes nothing but the time.

A worker is `python -c "…serve()"` at the other end of a pipe, not one of `multiprocessing`: it does
not run the caller's main module again (a script that calls `prepare` needs no guard), and ends by
itself when this process is gone, however it went.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, islice
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fasttrain.data.files import DataError
from fasttrain.data.prepare.sources import Document, Source
from fasttrain.data.tokenizer import Encoder, OtherIdsError, load_tokenizer

Ids = list[NDArray[np.unsignedinteger[Any]]]
_WORKER = "from fasttrain.data.prepare.encode import serve; serve()"

# Pieces that are encoded together; how many bytes of the input were read by then.
Batch = tuple[list["Piece"], int]


def encoded(
    batches: Iterator[Batch], encoder: Encoder, tokenizer_file: Path, workers: int
) -> Generator[tuple[Batch, Ids]]:
    """Yield each batch with the ids of its pieces, in the order of the batches."""
    if workers == 1:
        for batch in batches:
            yield batch, encoder.encode([piece.text for piece in batch[0]])
        return
    how = "tokenizers" if encoder.not_fast else "tiktoken"
    processes = [_Worker(tokenizer_file, how) for _ in range(workers)]
    free = SimpleQueue[_Worker]()
    for process in processes:
        free.put(process)

    def encode(pieces: Sequence[Piece]) -> Ids:
        process = free.get()
        try:
            return process.encode([piece.text for piece in pieces])
        finally:
            free.put(process)

    threads = ThreadPoolExecutor(workers)
    ahead: deque[tuple[Batch, Future[Ids]]] = deque()
    try:
        for batch in batches:
            ahead.append((batch, threads.submit(encode, batch[0])))
            if len(ahead) > workers + 2:
                done, future = ahead.popleft()
                yield done, future.result()
        while ahead:
            done, future = ahead.popleft()
            yield done, future.result()
    finally:
        for process in processes:
            process.end()
        threads.shutdown(cancel_futures=True)


class _Worker:
    """A process that encodes what it is sent."""

    def __init__(self, tokenizer_file: Path, how: str) -> None:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._pipe, theirs = Pipe()
        with theirs:
            pipe = theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-c", _WORKER, str(pipe), str(tokenizer_file), how],
                pass_fds=[pipe],
                # The processes are the parallelism; `tokenizers` would add a thread for each core.
                env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
            )

    def encode(self, texts: Sequence[str]) -> Ids:
        try:
            self._pipe.send(texts)
            answer: Ids | Exception = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise ChildProcessError(
                f"a worker process ended (status {self._process.wait()}): out of memory? "
                "--resume goes on from here, with fewer --workers if need be"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe.close()


def serve() -> None:
    """The life of a worker process: texts in, ids out, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the parent ends this process
    pipe, tokenizer_file, how = sys.argv[1:]
    encoder = Encoder(load_tokenizer(Path(tokenizer_file)), use_tiktoken=how == "tiktoken")
    with suppress(EOFError, OSError), Connection(int(pipe)) as parent:
        while True:
            try:
                parent.send(encoder.encode(parent.recv()))
            except (OtherIdsError, DataError) as error:
                parent.send(error)


FEW_VAL_TOKENS = 5_000  # to validate on: the loss of fewer says little
# Held out where nobody says how much: 0.5 %, of a text that this is too little of 100 kB, which are
# some 25,000 tokens, but never more than a tenth.
VAL_FRACTION, VAL_BYTES, MAX_VAL_FRACTION = 0.005, 100_000, 0.1
SMALL_BYTES = 20_000_000  # from here on 0.5 % are 100 kB
_BINS = 4096


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a document, and what to do with it."""

    text: str  # at most about half a million characters
    split: str
    last: bool  # of its document, in this split
    where: str  # its document's file, and line or row


def _share(document: Document) -> float:
    """The document's place in [0, 1), by its content alone."""
    digest = hashlib.sha256()
    for text in document.pieces():
        digest.update(text.encode())
    return int.from_bytes(digest.digest()[:4]) / 2**32


def _n_bytes(document: Document) -> int:
    return sum(len(text.encode()) for text in document.pieces())


class Splitter:
    """Assigns documents to train and val, in the same way in each pass.

    Documents go to validation by a hash of their text: one stays where it is when others come, and
    no text is in both splits. A text of one document is cut by position instead.

    Where no fraction is named and the text is small, the hash decides as well, but so that at least
    the bytes above are held out and less than twice as many: documents that are themselves larger
    are left to training. Where the others do not suffice, the large ones are cut by position.
    """

    def __init__(self, source: Source, val_fraction: float | None) -> None:
        self.source = source
        first_two = len(list(islice(source.documents(), 2)))
        if not first_two:
            reasons = "; ".join(f"{n} {reason}" for reason, n in source.problems.items())
            raise DataError(f"there is no text in the input ({reasons or 'no documents'})")
        self.single = first_two == 1
        self.val_fraction = VAL_FRACTION if val_fraction is None else val_fraction
        # No document fell below the fraction, and the nearest to it is held out.
        self.threshold, self.held_out_smallest = self.val_fraction, False
        self._limit = math.inf  # bytes: documents of more are not held out whole
        self._cuts_large = val_fraction != 0
        small = val_fraction is None and source.n_bytes < SMALL_BYTES
        if small and (total := self._total()) < SMALL_BYTES:
            self._fit(total)
        elif self.val_fraction and not self.single:
            # Ends at the first that is below, after 1 / val_fraction documents as a rule.
            smallest = 1.0
            for document in source.documents():
                smallest = min(smallest, _share(document))
                if smallest < self.val_fraction:
                    break
            if smallest >= self.val_fraction:
                self.threshold, self.held_out_smallest = smallest + 2**-33, True

    def _total(self) -> int:
        """Bytes of the text, or of the first documents that are not small together."""
        total = 0
        for document in self.source.documents():
            total += _n_bytes(document)
            if total >= SMALL_BYTES:
                break
        return total

    def _fit(self, total: int) -> None:
        """Choose what is held out of a small text."""
        self.val_fraction = min(max(VAL_BYTES / total, VAL_FRACTION), MAX_VAL_FRACTION)
        self._limit = wanted = self.val_fraction * total
        by_share = [0] * _BINS
        for document in self.source.documents():
            if (size := _n_bytes(document)) <= wanted:
                by_share[int(_share(document) * _BINS)] += size
        n_bins = next((n for n, held in enumerate(accumulate(by_share), 1) if held >= wanted), 0)
        self.threshold, self._cuts_large = n_bins / _BINS, n_bins == 0

    def pieces(self) -> Iterator[Piece]:
        """Every piece of every document, in order."""
        for document in self.source.documents():
            split, text = "", ""
            for next_split, next_text in self._parts(document):
                if split:
                    yield Piece(text, split, split != next_split, document.where)
                split, text = next_split, next_text
            if split:
                yield Piece(text, split, True, document.where)

    def _parts(self, document: Document) -> Iterator[tuple[str, str]]:
        """Split and text of each piece of a document."""
        large = self.single or (self._limit < math.inf and _n_bytes(document) > self._limit)
        if not (large and self._cuts_large):
            held_out = not large and self.threshold and _share(document) < self.threshold
            for text in document.pieces():
                yield "val" if held_out else "train", text
            return
        total = sum(len(text) for text in document.pieces())
        border = total - max(int(total * self.val_fraction), 1)
        at = 0
        for text in document.pieces():
            inside = min(max(border - at, 0), len(text))
            if 0 < inside < len(text):  # the cut: after a line's end if one is near
                line = text.rfind("\n", 0, inside) + 1
                inside = line if inside - line < 1000 and (line or at) else inside
            at += len(text)
            if inside:
                yield "train", text[:inside]
            if inside < len(text):
                yield "val", text[inside:]
