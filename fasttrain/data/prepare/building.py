"""From a splitter's pieces to shards on disk, with a place to go on from every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from itertools import islice

import numpy as np

from fasttrain.config.keys import counted
from fasttrain.data.files import DataError
from fasttrain.data.prepare.encode import Batch, Piece, Splitter, encoded
from fasttrain.data.prepare.partial import Partial
from fasttrain.data.prepare.writer import ShardWriter
from fasttrain.data.tokenizer import Encoder

__all__ = ["BATCH_CHARS", "write_splits"]

BATCH_CHARS = 4 << 20  # encoded at once: 100 MB of a process's memory, little time in handing over
CHECKPOINT_S = 5.0  # work that an interruption can cost
SPLITS = ("train", "val")


def _batches(splitter: Splitter) -> Iterator[Batch]:
    pieces: list[Piece] = []
    n_chars = 0
    for piece in splitter.pieces():
        pieces.append(piece)
        n_chars += len(piece.text)
        if n_chars >= BATCH_CHARS:
            yield pieces, splitter.source.done_bytes
            pieces, n_chars = [], 0
    if pieces:
        yield pieces, splitter.source.done_bytes


def write_splits(
    partial: Partial,
    splitter: Splitter,
    encoder: Encoder,
    shard_tokens: int,
    workers: int,
    show: Callable[[str, int], None],
) -> dict[str, tuple[ShardWriter, int]]:
    """Encodes what is not yet encoded, and writes it."""
    nothing = {"shards": [], "in_shard": 0, "ends_in_shard": 0}
    before = partial.state.get("splits", {split: (nothing, 0) for split in SPLITS})
    n_batches, n_lost = partial.state.get("batches", 0), partial.state.get("lost", 0)
    n_bytes = {split: before[split][1] for split in SPLITS}
    tail = np.array([] if encoder.end_of_text is None else [encoder.end_of_text], dtype=np.uint32)
    batches = _batches(splitter)
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(
                    partial.dataset,
                    split,
                    vocab_size=encoder.vocab_size,
                    shard_tokens=shard_tokens,
                    state=before[split][0],
                )
            )
            for split in SPLITS
        }
        for _, done_bytes in islice(batches, n_batches):
            show("finding the place", done_bytes)
        results = encoded(batches, encoder, partial.dataset / "tokenizer.json", workers)
        saved = time.monotonic()
        for (pieces, done_bytes), ids in stack.enter_context(closing(results)):
            for split, writer in writers.items():
                parts, ends, at = [np.empty(0, np.uint32)], [], 0
                for piece, tokens in zip(pieces, ids, strict=True):
                    if piece.split != split:
                        continue
                    n_bytes[split] += len(piece.text.encode())
                    if lost := encoder.losses.count(piece.text, tokens):
                        if splitter.source.strict:
                            raise _strictly(encoder, piece)
                        n_lost += lost
                    parts += [tokens, tail] if piece.last else [tokens]
                    at += tokens.size + (tail.size if piece.last else 0)
                    if piece.last:
                        ends.append(at)
                writer.write(np.concatenate(parts), ends)
            n_batches += 1
            if time.monotonic() - saved >= CHECKPOINT_S:
                states = {split: (writers[split].state(), n_bytes[split]) for split in SPLITS}
                partial.save(batches=n_batches, splits=states, lost=n_lost)
                saved = time.monotonic()
            n_tokens = sum(writer.n_tokens for writer in writers.values())
            n_documents = sum(writer.n_documents for writer in writers.values())
            done = f"{counted(n_tokens, 'token')}  {counted(n_documents, 'document')}"
            show(done, done_bytes)
    if n_lost:
        splitter.source.problems[encoder.losses.what] = n_lost
    return {split: (writer, n_bytes[split]) for split, writer in writers.items()}


def _strictly(encoder: Encoder, piece: Piece) -> DataError:
    """The first thing in a piece that the tokenizer has no token for, as an error."""
    begin, end = encoder.losses.first(piece.text)
    return DataError(
        f"{piece.where}: the tokenizer has no token for {piece.text[begin:end]!r} after "
        f"{piece.text[max(0, begin - 30) : begin]!r}, and --strict was asked for"
    )
