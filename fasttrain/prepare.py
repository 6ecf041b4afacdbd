"""Command: any text → a dataset folder of token shards.

    python -m fasttrain.prepare OUT --input PATH... [--tokenizer bpe:32768]
    python -m fasttrain.prepare --inspect OUT

Documents go to validation by a hash of their text, so that a document stays where it is when others
come, and no text is in both splits; a text of one document is cut by position instead. The input is
read in pieces and never held; the folder appears under its name when it is complete.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fasttrain.config import UserError
from fasttrain.data.files import DataError
from fasttrain.data.format import ShardWriter, write_dataset_json
from fasttrain.data.inspection import inspect
from fasttrain.data.sources import Document, Source, find_files
from fasttrain.data.tokenizer import (
    Encoder,
    byte_tokenizer,
    char_tokenizer,
    load_tokenizer,
    train_bpe,
)

__all__ = ["main", "prepare"]

BATCH_CHARS = 4 << 20  # encoded at once: 100 MB of the tokenizer's memory, work for all cores
BPE_BYTES = 256 << 20  # a BPE is trained on at most that much; more text changes few merges


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a document, and what to do with it."""

    text: str
    split: str
    last: bool  # of its document (in this split)


class _Splitter:
    """Assigns documents to train and val, anew in the same way for each pass."""

    def __init__(self, source: Source, val_fraction: float) -> None:
        self.source, self.val_fraction = source, val_fraction
        first_two = list(islice(source.documents(), 2))
        if not first_two:
            reasons = "; ".join(f"{n} {reason}" for reason, n in source.problems.items())
            raise DataError(f"there is no text in the input ({reasons or 'no documents'})")
        self.single = len(first_two) == 1
        self.threshold = val_fraction
        self.smallest = 1.0

    def pieces(self) -> Iterator[_Piece]:
        """Every piece of every document, in order."""
        for document in self.source.documents():
            if self.single and self.val_fraction:
                yield from self._cut(document)
                continue
            share = int(document.sha256()[:8], 16) / 2**32 if self.val_fraction else 1.0
            self.smallest = min(self.smallest, share)
            split = "val" if share < self.threshold else "train"
            previous = None
            for text in document.pieces():
                if previous is not None:
                    yield _Piece(previous, split, False)
                previous = text
            if previous is not None:
                yield _Piece(previous, split, True)

    def _cut(self, document: Document) -> Iterator[_Piece]:
        """The first part of a document for training, its last part for validation."""
        total = sum(len(text) for text in document.pieces())
        border = total - max(int(total * self.val_fraction), 1)
        at, last_train = 0, ""
        pieces = list[_Piece]()
        for text in document.pieces():
            inside = min(max(border - at, 0), len(text))
            if inside and inside < len(text):  # the cut: after a line's end if one is near
                line = text.rfind("\n", 0, inside) + 1
                inside = line if inside - line < 1000 and (line or last_train) else inside
            at += len(text)
            if inside:
                if last_train:
                    yield _Piece(last_train, "train", False)
                last_train = text[:inside]
            if inside < len(text):
                if last_train:
                    yield _Piece(last_train, "train", True)
                    last_train = ""
                pieces.append(_Piece(text[inside:], "val", False))
                if len(pieces) == 2:
                    yield pieces.pop(0)
        for piece in pieces:
            yield _Piece(piece.text, "val", True)


def _make_encoder(name: str, splitter: _Splitter, note: Callable[[str], None]) -> Encoder:
    """The tokenizer that a command names, trained on the training split if it is to be."""
    if name == "bytes":
        return Encoder(byte_tokenizer(), "bytes")
    if name == "chars":
        characters: set[str] = set()
        for piece in splitter.pieces():
            characters.update(piece.text)
        return Encoder(char_tokenizer(characters), "chars")
    if not name.startswith("bpe:"):
        encoder = Encoder(load_tokenizer(Path(name).expanduser()), "file")
        if encoder.end_of_text is None:
            note("The tokenizer has no end-of-text token: documents follow each other without one")
        return encoder
    try:
        wanted = int(name.removeprefix("bpe:").replace("_", ""))
    except ValueError:
        raise DataError(f"--tokenizer {name}: expected a number, as in bpe:32768") from None
    note(f"Training a BPE of {wanted} tokens")
    encoder = Encoder(train_bpe(_sample(splitter), wanted))
    if encoder.vocab_size < wanted:
        note(f"The text yields only {encoder.vocab_size} tokens of the {wanted} asked for")
    return encoder


def _sample(splitter: _Splitter) -> Iterator[str]:
    """Training text for a tokenizer: all of it, or pieces evenly spread over a large input."""
    every = max(1, splitter.source.n_bytes // BPE_BYTES)
    taken = 0
    for number, piece in enumerate(p for p in splitter.pieces() if p.split == "train"):
        if number % every == 0:
            taken += len(piece.text)
            if taken > 2 * BPE_BYTES:  # compressed input holds more than its size says
                return
            yield piece.text


def _write(
    folder: Path,
    splitter: _Splitter,
    encoder: Encoder,
    shard_tokens: int,
    show: Callable[[int, int], None],
) -> dict[str, tuple[ShardWriter, int]]:
    """Encodes everything. Returns for each split its closed writer and the bytes of its text."""
    writers = {
        split: ShardWriter(folder, split, vocab_size=encoder.vocab_size, shard_tokens=shard_tokens)
        for split in ("train", "val")
    }
    n_bytes = dict.fromkeys(writers, 0)
    tail = np.array([] if encoder.end_of_text is None else [encoder.end_of_text], dtype=np.uint32)

    def flush(batch: list[_Piece]) -> None:
        encoded = encoder.encode([piece.text for piece in batch])
        for split, writer in writers.items():
            parts, ends, at = [np.empty(0, np.uint32)], [], 0
            for piece, ids in zip(batch, encoded, strict=True):
                if piece.split != split:
                    continue
                n_bytes[split] += len(piece.text.encode())
                parts += [ids, tail] if piece.last else [ids]
                at += ids.size + (tail.size if piece.last else 0)
                if piece.last:
                    ends.append(at)
            writer.write(np.concatenate(parts), ends)
        show(
            sum(w.n_tokens for w in writers.values()), sum(w.n_documents for w in writers.values())
        )

    batch: list[_Piece] = []
    chars = 0
    for piece in splitter.pieces():
        batch.append(piece)
        chars += len(piece.text)
        if chars >= BATCH_CHARS:
            flush(batch)
            batch, chars = [], 0
    if batch:
        flush(batch)
    for writer in writers.values():
        writer.close()
    return {split: (writer, n_bytes[split]) for split, writer in writers.items()}


def prepare(
    out: Path,
    inputs: Sequence[str],
    *,
    text_field: str = "text",
    tokenizer: str = "bpe:32768",
    val_fraction: float = 0.005,
    shard_tokens: int = 100_000_000,
    strict: bool = False,
    note: Callable[[str], None] = print,
    progress: bool = False,
) -> Path:
    """Makes a dataset folder from text.

    Args:
        out: The folder to make; must not exist or be empty.
        inputs: Files, folders, globs, "-" for standard input.
        text_field: Of JSON lines and Parquet, that holds the text.
        tokenizer: "bpe:N", "bytes", "chars", or the path of a `tokenizer.json`.
        val_fraction: Part of the documents (of one document: of its text) held out, in [0, 1).
        shard_tokens: Tokens of a shard.
        strict: Problems in the text end the command instead of being counted.
        note: Called with each line that a user should see.
        progress: Show a progress bar on standard error.

    Returns:
        `out`.

    Raises:
        DataError: Bad arguments, unreadable input, no text, or `out` cannot be written.

    Memory: independent of the size of the input, about 0.5 GiB at most, plus the longest single
    record of JSON or Parquet and, while a BPE is trained, its table of words.
    """
    begin = time.perf_counter()
    if not 0 <= val_fraction < 1:
        raise DataError(f"--val-fraction must be at least 0 and below 1, got {val_fraction}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists already and is not empty; name a new folder or remove it")
    files, passed_over = find_files(inputs)
    if passed_over:
        shown = ", ".join(file.name for file in passed_over[:3])
        note(f"Passed over {len(passed_over)} files whose endings are not known, such as {shown}")
    source = Source(files, field=text_field, strict=strict)
    splitter = _Splitter(source, val_fraction)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.partial-"))
        try:
            with _Bar(source, progress) as bar:
                encoder = _make_encoder(tokenizer, splitter, note)
                result = _write(building, splitter, encoder, shard_tokens, bar.show)
                if val_fraction and not result["val"][0].n_tokens:
                    # Few documents, none of them below the fraction: hold out the one nearest to
                    # it, from the tokenizer's training too.
                    splitter.threshold = splitter.smallest + 2**-33
                    note(
                        f"No document fell into validation at --val-fraction {val_fraction}: the "
                        "one with the smallest hash is held out"
                    )
                    for file in building.iterdir():
                        file.unlink()
                    encoder = _make_encoder(tokenizer, splitter, note)
                    result = _write(building, splitter, encoder, shard_tokens, bar.show)
            if not result["train"][0].n_tokens:
                raise DataError("all text fell into validation; lower --val-fraction or add text")
            encoder.tokenizer.encode_special_tokens = False
            encoder.tokenizer.save(str(building / "tokenizer.json"), pretty=False)
            write_dataset_json(
                building,
                vocab_size=encoder.vocab_size,
                end_of_text=encoder.end_of_text,
                splits={k: (w.shards, n) for k, (w, n) in result.items() if w.n_tokens},
                source={
                    "inputs": list(inputs),
                    "tokenizer": tokenizer,
                    "val_fraction": val_fraction,
                    "text_field": text_field,
                    "problems": dict(source.problems),
                },
            )
            os.chmod(building, 0o755)
            os.rename(building, out)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error})") from error
    for reason, count in source.problems.items():
        note(f"{count} {reason}")
    seconds = time.perf_counter() - begin
    for split, (writer, n_bytes) in result.items():
        note(
            f"{split:5}  {writer.n_tokens:,} tokens, {writer.n_documents:,} documents, "
            f"{n_bytes:,} bytes, {n_bytes / max(writer.n_tokens, 1):.2f} bytes a token"
        )
    total = sum(n for _, n in result.values())
    note(f"Wrote {out} in {seconds:.1f} s ({total / 1e6 / seconds:.1f} MB/s)")
    return out


class _Bar:
    """A progress bar over the bytes of the input, on standard error, or nothing."""

    def __init__(self, source: Source, shown: bool) -> None:
        self._source = source
        self._bar = Progress(
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %  {task.description}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._task = self._bar.add_task("reading", total=source.n_bytes)

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, n_tokens: int, n_documents: int) -> None:
        self._bar.update(
            self._task,
            completed=self._source.done_bytes,
            description=f"{self._source.done_bytes / 1e6:,.0f} MB  {n_tokens:,} tokens  "
            f"{n_documents:,} documents",
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fasttrain.prepare",
        description="Make a dataset folder of token shards from text, or look into one.",
    )
    add = parser.add_argument
    add("out", nargs="?", type=Path, metavar="OUT", help="the folder to make")
    add("--input", nargs="+", metavar="PATH", help="files, folders, globs; - is standard input")
    add("--text-field", default="text", metavar="NAME", help="field of JSON lines and Parquet")
    add(
        "--tokenizer",
        default="bpe:32768",
        metavar="KIND",
        help="bpe:N, bytes, chars or the path of a tokenizer.json (default: %(default)s)",
    )
    add(
        "--val-fraction",
        type=float,
        default=0.005,
        metavar="F",
        help="part to hold out for validation (default: %(default)s)",
    )
    add(
        "--shard-tokens",
        type=lambda text: int(text.replace("_", "")),
        default=100_000_000,
        metavar="N",
        help="tokens of one shard (default: %(default)s)",
    )
    add("--strict", action="store_true", help="end at the first problem in the text")
    add("--inspect", type=Path, metavar="FOLDER", help="verify a dataset and show what is in it")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0, 2 for what the user can mend, 130 interrupted."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.inspect is not None:
            if options.out is not None or options.input:
                parser.error("--inspect looks into a folder and makes nothing: leave the rest out")
            for line in inspect(options.inspect):
                print(line)
            return 0
        if options.out is None or not options.input:
            parser.error("name the folder to make and the text: OUT --input PATH...")
        out = prepare(
            options.out,
            options.input,
            text_field=options.text_field,
            tokenizer=options.tokenizer,
            val_fraction=options.val_fraction,
            shard_tokens=options.shard_tokens,
            strict=options.strict,
            progress=sys.stderr.isatty(),
        )
        print(f"Train on it: python -m fasttrain.train configs/base.toml data.path={out}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
