"""Splits, and encoding in several processes whose number changes nothing but the time."""

import hashlib
import math
import multiprocessing
import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fasttrain.data.files import DataError
from fasttrain.data.prepare.sources import Document, Source
from fasttrain.data.tokenizer import Encoder, load_tokenizer

Ids = list[NDArray[np.unsignedinteger[Any]]]

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
    spawn = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    pool = ProcessPoolExecutor(workers, spawn, _start, (tokenizer_file, not encoder.not_fast))
    coming = ((b, pool.submit(_encode, [piece.text for piece in b[0]])) for b in batches)
    try:
        ahead = deque(islice(coming, workers + 2))
        while ahead:
            batch, future = ahead.popleft()
            ahead.extend(islice(coming, 1))
            yield batch, future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process ended: out of memory? --resume continues from here, with fewer "
            "--workers if need be"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(tokenizer_file: Path, use_tiktoken: bool) -> None:
    """Make a worker process ready."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the parent ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The processes are the parallelism; `tokenizers` would add a thread for each core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(load_tokenizer(tokenizer_file), use_tiktoken=use_tiktoken)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # it was killed


def _encode(texts: Sequence[str]) -> Ids:
    return _encoder.encode(texts)


_encoder: Encoder  # of a worker process


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


def _measured(document: Document) -> tuple[int, int, float]:
    """Return a document's characters, bytes, and place in [0, 1) by its content alone."""
    digest, n_chars, n_bytes = hashlib.sha256(), 0, 0
    for text in document.pieces():
        content = text.encode()
        digest.update(content)
        n_chars, n_bytes = n_chars + len(text), n_bytes + len(content)
    return n_chars, n_bytes, int.from_bytes(digest.digest()[:4]) / 2**32


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
        self.val_fraction = VAL_FRACTION if val_fraction is None else val_fraction
        # No document fell below the fraction, and the nearest to it is held out.
        self.threshold, self.held_out_smallest = self.val_fraction, False
        # Bytes: documents of more are not held out whole, but cut if `_cuts_large`.
        self._limit, self._cuts_large = 0 if first_two == 1 else math.inf, True
        # A small text is read to its end. The search for a document below the fraction takes
        # 1 / val_fraction documents as a rule.
        small, searches = val_fraction is None, bool(self._limit and self.val_fraction)
        total, smallest, sizes, shares = 0, 1.0, array("q"), array("d")
        for document in source.documents() if small or searches else ():
            _, size, share = _measured(document)
            total, smallest = total + size, min(smallest, share)
            if small := small and total < SMALL_BYTES:
                sizes.append(size)
                shares.append(share)
            elif smallest < self.val_fraction:
                break
        if small:
            self._fit(np.array(sizes), np.array(shares))
        elif searches and smallest >= self.val_fraction:
            self.threshold, self.held_out_smallest = smallest + 2**-33, True

    def _fit(self, sizes: NDArray[np.int64], shares: NDArray[np.float64]) -> None:
        """Choose what is held out of a small text."""
        total = int(sizes.sum())
        self.val_fraction = min(max(VAL_BYTES / total, VAL_FRACTION), MAX_VAL_FRACTION)
        wanted = self.val_fraction * total
        self._limit = min(self._limit, wanted)
        bins = (shares * _BINS).astype(np.int64)
        held = np.cumsum(np.bincount(bins, sizes * (sizes <= wanted), _BINS))
        n_bins = 1 + int(np.searchsorted(held, wanted)) if held[-1] >= wanted else 0
        self.threshold, self._cuts_large = n_bins / _BINS, n_bins == 0

    def pieces(self) -> Iterator[Piece]:
        """Every piece of every document, in order."""
        for document in self.source.documents():
            border, at = self._border(document), 0
            text = split = ""
            for block in document.pieces():
                inside = int(min(max(border - at, 0), len(block)))
                if 0 < inside < len(block):  # the cut: after a line's end if one is near
                    line = block.rfind("\n", 0, inside) + 1
                    inside = line if inside - line < 1000 and (line or at) else inside
                at += len(block)
                for name, part in (("train", block[:inside]), ("val", block[inside:])):
                    if part:
                        if text:
                            yield Piece(text, split, split != name, document.where)
                        text, split = part, name
            yield Piece(text, split, True, document.where)

    def _border(self, document: Document) -> float:
        """How many characters of a document are for training; infinite: all."""
        if not self.val_fraction:
            return math.inf
        n_chars, size, share = _measured(document)
        if size > self._limit:
            held_out = max(int(n_chars * self.val_fraction), 1)
            return n_chars - held_out if self._cuts_large else math.inf
        return 0 if share < self.threshold else math.inf
