"""Command: any text → a dataset folder of token shards.

    python -m fasttrain.prepare OUT --input PATH... [--tokenizer bpe:32768] [--resume]
    python -m fasttrain.prepare --inspect OUT

Documents go to validation by a hash of their text, so that a document stays where it is when others
come, and no text is in both splits; a text of one document is cut by position instead. Of a small
text more is held out than of a large one, unless --val-fraction is given. The input is read in
pieces and never held; the folder appears under its name when it is complete, and does not
depend on how many processes made it, nor on how often they were interrupted.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fasttrain.command import check_system, command, make_parser, usable_cores
from fasttrain.config.keys import counted
from fasttrain.data.files import DataError, sha256_of, write_atomically
from fasttrain.data.format import (
    DATASET_JSON,
    Split,
    open_dataset,
    read_dataset_json,
    write_dataset_json,
)
from fasttrain.data.prepare.encode import (
    FEW_VAL_TOKENS,
    MAX_VAL_FRACTION,
    SMALL_BYTES,
    VAL_BYTES,
    VAL_FRACTION,
    Splitter,
)
from fasttrain.data.prepare.sources import PIECE_CHARS, Source, find_files
from fasttrain.data.prepare.writer import BATCH_CHARS, Partial, write_splits
from fasttrain.data.tokenizer import (
    Encoder,
    OtherIdsError,
    byte_tokenizer,
    char_tokenizer,
    load_tokenizer,
    train_bpe,
)
from fasttrain.log.console import format_duration

BPE_BYTES = 256 << 20  # a BPE is trained on at most that much; more text changes few merges
WORKER_BYTES = 16 << 20  # of input for each process: with less, starting it takes longer
LINE_S = 15.0  # between lines of progress where there is no terminal
BLOCK_TOKENS = 4 << 20  # counted at once by --inspect
MOST_FREQUENT, SAMPLES, SAMPLE_TOKENS = 10, 3, 40  # shown by --inspect
SPEED_S = 30.0  # the time left is that at the speed of the last


Note = Callable[[str], None]  # takes each line that a user should see


def _make_tokenizer(name: str, splitter: Splitter, note: Note, bar: _Bar) -> tokenizers.Tokenizer:
    """The tokenizer that a command names, trained on the training split if it is to be."""
    if name == "bytes":
        return byte_tokenizer()
    if name == "chars":
        characters: set[str] = set()
        for piece in splitter.pieces():
            characters.update(piece.text)
            bar.show("collecting characters", splitter.source.done_bytes)
        return char_tokenizer(characters)
    if not name.startswith("bpe:"):
        if not (path := Path(name).expanduser()).is_file():
            raise DataError(
                f"--tokenizer {name}: there is no such tokenizer file; name an existing "
                "tokenizer.json, or bpe:N, bytes or chars"
            )
        return load_tokenizer(path)
    try:
        wanted = int(name.removeprefix("bpe:"))
    except ValueError:
        raise DataError(f"--tokenizer {name}: expected a number, as in bpe:32768") from None
    note(f"Training a BPE of {wanted} tokens")
    tokenizer = train_bpe(_sample(splitter, bar), wanted)
    if tokenizer.get_vocab_size() < wanted:
        note(f"The text yields only {tokenizer.get_vocab_size()} tokens of the {wanted} asked for")
    return tokenizer


def _sample(splitter: Splitter, bar: _Bar) -> Iterator[str]:
    """Training text for a tokenizer: all of it, or pieces evenly spread over a large input."""
    every = max(1, splitter.source.n_bytes // BPE_BYTES)
    taken = 0
    for number, piece in enumerate(p for p in splitter.pieces() if p.split == "train"):
        if number % every == 0:
            taken += len(piece.text)
            if taken > 2 * BPE_BYTES:  # compressed input holds more than its size says
                break
            bar.show("reading for the tokenizer", splitter.source.done_bytes)
            yield piece.text
    bar.show("training the tokenizer", None)


def prepare(
    out: Path,
    inputs: Sequence[str],
    *,
    text_field: str = "text",
    tokenizer: str = "bpe:32768",
    val_fraction: float | None = None,
    shard_tokens: int = 100_000_000,
    strict: bool = False,
    workers: int = 1,
    resume: bool = False,
    note: Note = print,
    progress: bool = False,
) -> Path:
    """Make the dataset folder `out` from text; the arguments are the options of the command.

    `note` is called with each line that a user should see; `progress` is shown on standard error.

    Memory: independent of the size of the input, about 0.5 GiB at most and 0.2 GiB for each worker,
    plus the longest single record of JSON or Parquet and, while a BPE is trained, its table of
    words.
    """
    begin = time.perf_counter()
    out = Path(os.path.abspath(out))
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise DataError(f"--val-fraction must be at least 0 and below 1, got {val_fraction}")
    if workers < 1:
        raise DataError(f"--workers must be at least 1, got {workers}")
    files, passed_over = find_files(inputs)
    if passed_over:
        shown = ", ".join(file.name for file in passed_over[:3]) + ", …" * (len(passed_over) > 3)
        number = counted(len(passed_over), "file")
        note(f"Passed over {number} with an unknown ending: {shown}")
    tokenizer_file = Path(tokenizer).expanduser()
    source = Source(files, field=text_field, strict=strict)
    if val_fraction is None and source.n_bytes >= SMALL_BYTES:
        val_fraction = VAL_FRACTION
    asked: dict[str, Any] = {
        "source": {
            "inputs": list(inputs),
            "n_files": len(files),
            "n_bytes": source.n_bytes,
            "text_field": text_field,
            "tokenizer": tokenizer,
            "val_fraction": "auto" if val_fraction is None else val_fraction,
            "shard_tokens": shard_tokens,
        },
        "files": source.fingerprint(),
        "tokenizer_sha256": sha256_of(tokenizer_file) if tokenizer_file.is_file() else "",
        "recipe": [1, PIECE_CHARS, BATCH_CHARS, BPE_BYTES, tokenizers.__version__],
    }
    try:
        with closing(Partial(out, asked, resume=resume, note=note)) as partial:
            if partial.complete:
                note(f"{out} is complete already")
                return out
            with _Bar(source.n_bytes, progress) as bar:
                splitter = Splitter(source, val_fraction)
                encoder = _encoder(partial, tokenizer, splitter, note, bar)
                processes = 1
                if encoder.kind == "bpe":
                    processes = max(1, min(workers, source.n_bytes // WORKER_BYTES))
                how = (shard_tokens, processes, bar.show)
                try:
                    result = write_splits(partial, splitter, encoder, *how)
                except OtherIdsError as error:
                    note(
                        f"tiktoken does not split this text as its tokenizer does: {error}. "
                        "Encoding all of it with tokenizers instead, which is slower"
                    )
                    partial.state.clear()
                    partial.save(exact=True)
                    encoder = Encoder(encoder.tokenizer, use_tiktoken=False)
                    result = write_splits(partial, splitter, encoder, *how)
            if not result["train"][0].n_tokens:
                raise DataError("all text fell into validation; lower --val-fraction or add text")
            write_dataset_json(
                partial.dataset,
                vocab_size=encoder.vocab_size,
                end_of_text=encoder.end_of_text,
                splits={k: (w.shards, n) for k, (w, n) in result.items() if w.n_tokens},
                source=asked["source"] | {"problems": dict(source.problems)},
            )
            partial.publish()
    except ChildProcessError as error:
        raise DataError(str(error)) from error
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error})") from error
    for reason, count in source.problems.items():
        note(f"{reason}: {count:,}")
    seconds = time.perf_counter() - begin
    for split, (writer, n_bytes) in result.items():
        note(
            f"{split:5}  {counted(writer.n_tokens, 'token')}, "
            f"{counted(writer.n_documents, 'document')}, {counted(n_bytes, 'byte')}, "
            f"{n_bytes / max(writer.n_tokens, 1):.2f} bytes a token"
        )
    n_val = result["val"][0].n_tokens
    if n_val < FEW_VAL_TOKENS and val_fraction != 0:
        enough = val_fraction is None or val_fraction >= MAX_VAL_FRACTION
        remedy = "add text" if enough else f"--val-fraction {MAX_VAL_FRACTION} holds out more"
        note(f"Only {counted(n_val, 'token')} to validate on, whose loss says little: {remedy}")
    total = sum(n for _, n in result.values())
    note(f"Wrote {out} in {seconds:.1f} s ({total / 1e6 / seconds:.1f} MB/s)")
    return out


def _encoder(partial: Partial, name: str, splitter: Splitter, note: Note, bar: _Bar) -> Encoder:
    """What encodes: with the tokenizer of an interrupted run, or made now and kept for another."""
    path = partial.dataset / "tokenizer.json"
    if splitter.held_out_smallest:
        note(
            f"No document fell into validation at --val-fraction {splitter.val_fraction}: the one "
            "with the smallest hash is held out"
        )
    if not partial.state:
        tokenizer = _make_tokenizer(name, splitter, note, bar)
        tokenizer.encode_special_tokens = False
        write_atomically(path, tokenizer.to_str(pretty=False).encode())
        if name.startswith("bpe:"):
            partial.save(exact=False)
    kind = name if name in ("bytes", "chars") else "bpe"
    exact = partial.state.get("exact", False)
    encoder = Encoder(load_tokenizer(path), kind, use_tiktoken=not exact)
    if encoder.end_of_text is None:
        note("The tokenizer has no end-of-text token: documents follow each other without one")
    if encoder.not_fast and splitter.source.n_bytes > WORKER_BYTES:
        note(f"Encoding with tokenizers, not tiktoken, because {encoder.not_fast}")
    return encoder


class _Bar(Progress):
    """How far it is, on standard error: a bar in a terminal, now and then a line elsewhere."""

    def __init__(self, n_bytes: int, shown: bool) -> None:
        console = Console(stderr=True)
        self._lines = shown and not console.is_terminal
        super().__init__(
            BarColumn(),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=not shown or self._lines,
            get_time=time.monotonic,
            speed_estimate_period=SPEED_S,
        )
        self._said = time.monotonic()
        self._n_bytes = n_bytes
        self.add_task("reading", total=n_bytes)
        (self._task,) = self.tasks

    def show(self, what: str, done_bytes: int | None) -> None:
        """What is being done, and how much of the input is; None: for a time nobody knows."""
        task = self._task
        if done_bytes is None:
            self.reset(task.id, description=what)
            task.total = None  # the bar only moves to and fro
            return
        if task.total is None or done_bytes < task.completed:  # another pass
            self.reset(task.id, total=self._n_bytes)
        self.update(task.id, completed=done_bytes)
        left = "–" if task.time_remaining is None else format_duration(task.time_remaining)
        digits = 0 if self._n_bytes >= 10e6 else 1
        done, total = (f"{n / 1e6:,.{digits}f}" for n in (done_bytes, self._n_bytes))
        text = f"{done} of {total} MB  {what}  {left} left"
        self.update(task.id, description=text)
        now = time.monotonic()
        if self._lines and done_bytes > 0 and now - self._said >= LINE_S:
            self._said = now
            print(text, file=sys.stderr, flush=True)


def inspect(folder: Path) -> Iterator[str]:
    """Yield what is in a prepared dataset, in lines to print, with every hash verified."""
    if not (folder / DATASET_JSON).is_file():
        raise DataError(
            f"{folder}: no {DATASET_JSON} in it, so there is nothing to verify; only what "
            "fasttrain.prepare wrote can be inspected"
        )
    meta = read_dataset_json(folder)
    splits: tuple[Split, ...] = ("train", "val")
    datasets = {split: open_dataset(folder, split) for split in splits if split in meta["splits"]}
    for name, dataset in datasets.items():
        for shard, listed in zip(dataset.shards, meta["splits"][name]["shards"], strict=True):
            if shard.scan(None).sha256 != listed["sha256"]:  # of the file itself, not of a cache
                raise DataError(f"{shard.path}: not the file that {DATASET_JSON} records: damaged")
        _ = dataset.document_ends
    n_files = 1 + sum(2 * len(dataset.shards) for dataset in datasets.values())
    yield f"{folder}: {meta['vocab_size']:,} tokens in the vocabulary, stored as {meta['dtype']}"
    for key, value in sorted(meta.get("source", {}).items()):
        yield f"  {key}: {value}"
    tokenizer = load_tokenizer(folder / meta["tokenizer"]["file"])

    def shown(tokens: list[int]) -> str:
        return repr(tokenizer.decode(tokens, skip_special_tokens=False))

    for name, dataset in datasets.items():
        listed = meta["splits"][name]
        yield (
            f"{name}: {dataset.n_tokens:,} tokens in {counted(len(dataset.shards), 'shard')}, "
            f"{counted(listed['documents'], 'document')}, {listed['bytes']:,} bytes, "
            f"{listed['bytes'] / dataset.n_tokens:.2f} bytes a token"
        )
        counts = np.zeros(meta["vocab_size"], np.int64)
        for start in range(0, dataset.n_tokens, BLOCK_TOKENS):
            block = dataset.read(start, min(BLOCK_TOKENS, dataset.n_tokens - start))
            counts += np.bincount(block, minlength=len(counts))
        unused = int((counts == 0).sum())
        yield f"  {unused:,} of the {meta['vocab_size']:,} tokens do not occur; most frequent:"
        for token in np.argsort(-counts, kind="stable")[:MOST_FREQUENT].tolist():
            if counts[token]:
                share = 100 * counts[token] / dataset.n_tokens
                yield f"  {token:8d} {share:6.2f} %  {shown([token])}"
        for number in range(SAMPLES):
            start = max(dataset.n_tokens - SAMPLE_TOKENS, 0) * number // (SAMPLES - 1)
            tokens = dataset.read(start, min(SAMPLE_TOKENS, dataset.n_tokens - start))
            yield f"  from token {start:,}: {shown(tokens.tolist())}"
    yield f"All {n_files} files have the SHA-256 that {DATASET_JSON} records."


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0, 2 for what the user can mend, 130 interrupted."""
    what = "Make a dataset folder of token shards from text, or inspect one."
    parser = make_parser("prepare", what)
    add = parser.add_argument
    add("out", nargs="?", type=Path, metavar="OUT", help="the folder to make")
    add("--input", nargs="+", metavar="PATH", help="files, folders and globs; - is standard input")
    add("--text-field", default="text", metavar="NAME", help="field of JSON lines and Parquet")
    kinds = "bpe:N, bytes, chars or the path of a tokenizer.json (default: %(default)s)"
    add("--tokenizer", default="bpe:32768", metavar="KIND", help=kinds)
    part = f"fraction held out for validation (default: {VAL_FRACTION}; for less than "
    part += f"{SMALL_BYTES / 1e6:.0f} MB, what amounts to {VAL_BYTES / 1e3:.0f} kB, but at most "
    add("--val-fraction", type=float, metavar="F", help=f"{part}{MAX_VAL_FRACTION})")
    tokens = "tokens per shard (default: %(default)s)"
    add("--shard-tokens", type=int, default=100_000_000, metavar="N", help=tokens)
    add("--strict", action="store_true", help="stop at the first problem in the text")
    time_only = "encoding processes; affects only the time (default: one per core, %(default)s)"
    add("--workers", type=int, default=usable_cores(), metavar="N", help=time_only)
    add("--resume", action="store_true", help="continue an interrupted run")
    add("--inspect", type=Path, metavar="FOLDER", help="verify a dataset and show what it contains")
    options = vars(parser.parse_args(arguments))
    check_system()
    folder, out, inputs = (options.pop(name) for name in ("inspect", "out", "input"))
    try:
        if folder is not None:
            if out is not None or inputs:
                parser.error("--inspect looks into a folder and makes nothing: leave the rest out")
            for line in inspect(folder):
                print(line)
            return 0
        if out is None or not inputs:
            parser.error("name the folder to make and the text: OUT --input PATH...")
        prepare(out, inputs, **options, progress=True)
        path = shlex.quote(str(out))
        print(f"Train on it: python -m fasttrain.train base data.path={path}")
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
