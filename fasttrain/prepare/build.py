"""Text to a dataset: a pass to split it, one to train its tokenizer, one to encode it.

Several machines may each make a part, of which `merge` makes what a single one would make.
"""

import codecs
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fasttrain import storage as store
from fasttrain.config.keys import counted
from fasttrain.data.dataset import BLOCK_TOKENS, FEW_VAL_TOKENS, TokenDataset
from fasttrain.data.format import SPLITS, Split, open_dataset, write_dataset_json
from fasttrain.data.remote import ShardCache
from fasttrain.data.tokenizer import (
    TEXT_PATTERN,
    Encoder,
    OtherIdsError,
    byte_tokenizer,
    char_tokenizer,
    load_tokenizer,
    train_bpe,
)
from fasttrain.prepare import sources
from fasttrain.prepare.inputs import FORMATS, PLAIN, File, find_files, told
from fasttrain.prepare.sources import Piece, Source, Splitter
from fasttrain.prepare.writer import Asked, Note, Partial, ShardWriter, building, parts_of
from fasttrain.printing import say
from fasttrain.storage import DataError, sha256_of, shown, write_atomically

RECIPE = 2  # raised when the same text is split or encoded in another way
BPE_BYTES = 256 << 20  # a BPE is trained on at most that much; more text changes few merges
BATCH_CHARS = 4 << 20  # encoded at once: 100 MB of a process's memory, little time in handing over
WORKER_BYTES = 16 << 20  # of input for each process: with less, starting it takes longer
CHECKPOINT_S = 5.0  # work that an interruption can cost
LINE_S = 15.0  # between lines of progress where there is no terminal

# Pieces that are encoded together; how many bytes of the input were read by then.
PieceGroup = tuple[list[Piece], int]
Ids = list[NDArray[np.unsignedinteger[Any]]]
TOKENIZER = "tokenizer.json"
_encoder: Encoder  # of a worker process


def prepare(
    out: Path | str,
    inputs: Sequence[str],
    *,
    files: Sequence[File] | None = None,
    text_field: str = "text",
    format: str = "auto",
    encoding: str = "auto",
    separator: str = "",
    tokenizer: str = "bpe:32768",
    pattern: str = TEXT_PATTERN,
    val_fraction: float | None = None,
    shard_tokens: int = 100_000_000,
    strict: bool = False,
    workers: int = 1,
    resume: bool = False,
    shard_of: str | None = None,
    note: Note = say,
    progress: bool = False,
) -> None:
    """Make the dataset `out` from text; the arguments are the options of the command.

    `files` are those that `inputs` mean, where the caller has found them: plain text in UTF-8.
    `pattern` is that of the words of a BPE. `note` is called with each line that a user should see;
    `progress` is shown on standard error.

    Memory: independent of the size of the input, about 0.5 GiB at most and 0.2 GiB for each worker,
    plus the longest record of JSON or Parquet and, while a BPE is trained, its table of words.
    """
    begin = time.perf_counter()
    # What is asked for
    part = _part_of(shard_of)
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise DataError(f"--val-fraction must be at least 0 and below 1, got {val_fraction}")
    if workers < 1:
        raise DataError(f"--workers must be at least 1, got {workers}")
    place = store.place_of(out)
    if shard_of:
        place += f".parts/{part.number}-of-{part.n_parts}"
    encoding = _encoding_name(format, encoding)
    separator = separator.replace("\\n", "\n").replace("\\t", "\t")

    # The text
    if files is None:
        files = _find(inputs, format, encoding, note)
    else:
        files = [replace(file, content=PLAIN) for file in files]
    source = Source(
        files,
        field=text_field,
        strict=strict,
        format=format,
        encoding=encoding,
        separator=separator,
    )
    source.note = note
    # Only plain files hold as much text as they have bytes; a part does not know the others' text.
    is_size_known = bool(shard_of) or all(file.content == PLAIN for file in source.files)
    if val_fraction is None and is_size_known and source.n_bytes >= sources.SMALL_BYTES:
        val_fraction = sources.VAL_FRACTION

    # All that shapes the dataset, by which an interrupted run is known
    options = {
        "inputs": list(map(shown, inputs)),
        "n_files": len(files),
        "n_bytes": source.n_bytes,
        "text_field": text_field,
    }
    if format != "auto":
        options["format"] = format
    if encoding != "auto":
        options["encoding"] = encoding
    if separator:
        options["separator"] = separator
    options["tokenizer"] = tokenizer
    options["val_fraction"] = "auto" if val_fraction is None else val_fraction
    options["shard_tokens"] = shard_tokens
    if shard_of:
        options["part"] = f"{part.number}/{part.n_parts}"
    tokenizer_file = Path(tokenizer).expanduser()
    asked: Asked = {
        "source": options,
        "files": [file.identity() for file in files],
        "tokenizer_sha256": sha256_of(tokenizer_file) if tokenizer_file.is_file() else "",
        "recipe": [RECIPE, sources.PIECE_CHARS, BATCH_CHARS, BPE_BYTES, tokenizers.__version__],
    }

    # The dataset
    with building(place, asked, resume=resume, note=note) as partial:
        if partial is None:
            return
        with Bar(source.n_bytes, progress) as bar:
            splitter = Splitter(source, val_fraction)
            if not partial.state:
                _write_tokenizer(partial, tokenizer, pattern, splitter, note, bar)
            # Split and tokenizer are those of all the text.
            bar.n_bytes = source.take(part.number, part.n_parts)
            writers, encoder = _encode_all(partial, splitter, workers, note, bar)
        publish(partial, writers, encoder.end_of_text, source.problems, source.n_documents, note)
    seconds = time.perf_counter() - begin
    n_bytes = sum(writer.n_bytes for writer in writers.values())
    note(f"Wrote {shown(place)} in {seconds:.1f} s ({n_bytes / 1e6 / seconds:.1f} MB/s)")


class _Part(NamedTuple):
    """Which part of a dataset is made, counted from 1."""

    number: int
    n_parts: int


def _part_of(shard_of: str | None) -> _Part:
    """Return the part that ``--shard-of I/N`` names; None: the only one."""
    match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", shard_of or "1/1")
    part = _Part(*map(int, match.groups())) if match else _Part(0, 0)
    if not 1 <= part.number <= part.n_parts:
        raise DataError(f"--shard-of {shard_of}: expected I/N with I from 1 to N, as in 1/4")
    return part


def _find(inputs: Sequence[str], format: str, encoding: str, note: Note) -> list[File]:
    """Return the files that the inputs mean, and say how many."""
    files, left_out = find_files(inputs, format=format, encoding=encoding)
    n_bytes = sum(file.size for file in files)
    line = f"Found {counted(len(files), 'file')} ({n_bytes:,} bytes)"
    note(f"{line}; left out {told(left_out)}" if left_out else line)
    return files


def _write_tokenizer(
    partial: Partial, name: str, pattern: str, splitter: Splitter, note: Note, bar: "Bar"
) -> None:
    """Make the tokenizer, and write it into the dataset."""
    tokenizer = _make_tokenizer(name, pattern, splitter, note, bar)
    tokenizer.encode_special_tokens = False
    write_atomically(partial.dataset / TOKENIZER, tokenizer.to_str(pretty=False).encode())
    if name.startswith("bpe:"):
        partial.save(exact=False)


def _encode_all(
    partial: Partial, splitter: Splitter, workers: int, note: Note, bar: "Bar"
) -> tuple[Mapping[Split, ShardWriter], Encoder]:
    """Encode the text and write the shards; return their writers, and the encoder.

    Text is encoded with tiktoken. If that splits it otherwise than the tokenizer does, all of it is
    encoded again with tokenizers.
    """
    source = splitter.source
    options = partial.asked["source"]
    kind = options["tokenizer"] if options["tokenizer"] in ("bytes", "chars") else "bpe"
    n_processes = 1
    if kind == "bpe":
        n_processes = max(1, min(workers, source.n_bytes // WORKER_BYTES))
    while True:
        exact = partial.state.get("exact", False)
        tokenizer = load_tokenizer(partial.dataset / TOKENIZER)
        encoder = Encoder(tokenizer, kind, use_tiktoken=not exact)
        if encoder.end_of_text is None:
            note("The tokenizer has no end-of-text token: documents are not separated")
        if encoder.not_fast and source.n_bytes > WORKER_BYTES:
            note(f"Encoding with tokenizers, not tiktoken, because {encoder.not_fast}")
        try:
            return write_splits(partial, splitter, encoder, n_processes, bar.show), encoder
        except OtherIdsError as error:
            problem = f"tiktoken does not split this text as its tokenizer does: {error}"
            if "part" in options:
                remedy = "make all parts anew where tiktoken is not installed"
                raise DataError(f"{problem}; {remedy}") from error
            note(f"{problem}. Encoding all of it with tokenizers instead, which is slower")
            partial.state = {}
            partial.save(exact=True)


def _encoding_name(format: str, encoding: str) -> str:
    """Refuse names of formats and encodings that do not exist; return Python's for the encoding."""
    if format != "auto" and format not in FORMATS:
        raise DataError(f"--format {format}: expected auto, {', '.join(FORMATS)}")
    if encoding == "auto":
        return encoding
    try:
        b"".decode(encoding)
        name = codecs.lookup(encoding).name
        if name in ("idna", "punycode", "undefined"):  # codecs, but not of texts
            raise LookupError
        return name
    except LookupError:
        remedy = "name one of Python's, as utf-8, utf-16, cp1252 or shift_jis"
        raise DataError(f"--encoding {encoding}: there is no such encoding; {remedy}") from None


def publish(
    partial: Partial,
    writers: Mapping[Split, ShardWriter],
    end_of_text: int | None,
    problems: Mapping[str, int],
    n_documents: int,
    note: Note,
) -> None:
    """Finish the shards; give the dataset its `dataset.json` and its name; say what is in it."""
    source, n_val = partial.asked["source"], writers["val"].n_tokens
    is_part, fraction = "part" in source, source["val_fraction"]
    if not writers["train"].n_tokens and not is_part:
        raise DataError("all text fell into validation; lower --val-fraction or add text")
    write_dataset_json(
        partial.dataset,
        vocab_size=writers["train"].vocab_size,
        end_of_text=end_of_text,
        splits={k: (w.close(), w.n_bytes) for k, w in writers.items() if w.n_tokens or is_part},
        source=source | {"n_documents": n_documents, "problems": dict(sorted(problems.items()))},
    )
    partial.publish()
    n_bytes = sum(writer.n_bytes for writer in writers.values())
    n_bad = problems.get(sources.BAD_BYTES, 0)
    share = f"{n_bad:,} ({100 * n_bad / max(n_bytes, 1):.2g} %)" if n_bad else "0"
    note(
        f"Text: {counted(n_bytes, 'byte')}, {counted(n_documents, 'document')}, bad bytes: {share}"
    )
    for reason, count in sorted(problems.items()):
        note(f"{reason}: {count:,}")
    for split, writer in writers.items():
        note(
            f"{split:5}  {counted(writer.n_tokens, 'token')}, "
            f"{counted(writer.n_documents, 'document')}, {counted(writer.n_bytes, 'byte')} "
            f"({100 * writer.n_bytes / max(n_bytes, 1):.3g} % of the text), "
            f"{writer.n_bytes / max(writer.n_tokens, 1):.2f} bytes a token"
        )
    if n_val < FEW_VAL_TOKENS and fraction != 0 and not is_part:
        most = sources.MAX_VAL_FRACTION
        enough = fraction == "auto" or fraction >= most
        remedy = "add text" if enough else f"--val-fraction {most} holds out more"
        note(f"Only {counted(n_val, 'token')} to validate on, whose loss says little: {remedy}")


def _make_tokenizer(
    name: str, pattern: str, splitter: Splitter, note: Note, bar: "Bar"
) -> tokenizers.Tokenizer:
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
            remedy = "name an existing tokenizer.json, or bpe:N, bytes or chars"
            raise DataError(f"--tokenizer {name}: there is no such tokenizer file; {remedy}")
        return load_tokenizer(path)
    if not name[4:].isdecimal():
        raise DataError(f"--tokenizer {name}: expected a number, as in bpe:32768")
    wanted = int(name[4:])
    note(f"Training a BPE of {wanted} tokens")
    tokenizer = train_bpe(_sample(splitter, bar), wanted, pattern=pattern)
    if tokenizer.get_vocab_size() < wanted:
        note(f"The text yields only {tokenizer.get_vocab_size()} tokens of the {wanted} asked for")
    return tokenizer


def _sample(splitter: Splitter, bar: "Bar") -> Iterator[str]:
    """Training text for a tokenizer: all of it, or pieces evenly spread over a large input."""
    every, taken = max(1, splitter.source.n_bytes // BPE_BYTES), 0
    train = (piece.text for piece in splitter.pieces() if piece.split == "train")
    for text in islice(train, 0, None, every):
        taken += len(text)
        if taken > 2 * BPE_BYTES:  # compressed input holds more than its size says
            break
        bar.show("reading for the tokenizer", splitter.source.done_bytes)
        yield text
    bar.show("training the tokenizer", None)


def _batches(splitter: Splitter) -> Iterator[PieceGroup]:
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


def encoded(
    batches: Iterator[PieceGroup], encoder: Encoder, tokenizer_file: Path, workers: int
) -> Generator[tuple[PieceGroup, Ids]]:
    """Yield each batch with the ids of its pieces, in the same order by any number of workers."""
    if workers == 1:
        for batch in batches:
            yield batch, encoder.encode(*_texts(batch))
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    pool = ProcessPoolExecutor(workers, spawn, _start, (tokenizer_file, not encoder.not_fast))
    coming = ((batch, pool.submit(_encode, *_texts(batch))) for batch in batches)
    try:
        ahead = deque(islice(coming, workers + 2))
        while ahead:
            batch, future = ahead.popleft()
            ahead.extend(islice(coming, 1))
            yield batch, future.result()
    except BrokenProcessPool as error:
        remedy = "--resume continues from here, with fewer --workers if need be"
        raise DataError(f"a worker process ended: out of memory? {remedy}") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(tokenizer_file: Path, use_tiktoken: bool) -> None:
    """Make a worker process ready."""
    global _encoder
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)  # it was killed

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the parent ends this process
    threading.Thread(target=end_with_parent, daemon=True).start()
    # The processes are the parallelism; `tokenizers` would add a thread for each core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(load_tokenizer(tokenizer_file), use_tiktoken=use_tiktoken)


def _encode(texts: Sequence[str], around: Sequence[tuple[str, str]]) -> Ids:
    return _encoder.encode(texts, around)


def _texts(batch: PieceGroup) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the text of each piece, and what stands before and after it."""
    pieces, _ = batch
    return [piece.text for piece in pieces], [(piece.before, piece.after) for piece in pieces]


def _writers(partial: Partial, vocab_size: int) -> dict[Split, ShardWriter]:
    options = {"vocab_size": vocab_size, "shard_tokens": partial.asked["source"]["shard_tokens"]}
    states = partial.state.get("splits", {})
    return {s: ShardWriter(partial.dataset, s, state=states.get(s), **options) for s in SPLITS}


def write_splits(
    partial: Partial,
    splitter: Splitter,
    encoder: Encoder,
    workers: int,
    show: Callable[[str, int], None],
) -> dict[Split, ShardWriter]:
    """Encode what is not yet encoded, and write it; call `show` with each state and bytes read.

    Return the writer of each split. `OtherIdsError` says that tiktoken cannot be used on this text.
    """
    n_batches, n_lost = partial.state.get("batches", 0), partial.state.get("lost", 0)
    tail = np.array([] if encoder.end_of_text is None else [encoder.end_of_text], dtype=np.uint32)
    batches = _batches(splitter)
    for _, done_bytes in islice(batches, n_batches):
        show("finding the place", done_bytes)
    results = encoded(batches, encoder, partial.dataset / "tokenizer.json", workers)
    writers, saved = _writers(partial, encoder.vocab_size), time.monotonic()
    with closing(results):
        for (pieces, done_bytes), ids in results:
            for piece, tokens in zip(pieces, ids, strict=True):
                lost = encoder.losses.count(piece.text, tokens)
                if lost and splitter.source.strict:
                    places = encoder.losses.places(piece.text)
                    begin, end = next(iter(places), (0, len(piece.text)))
                    raise DataError(
                        f"{piece.where}: the tokenizer has no token for {piece.text[begin:end]!r} "
                        f"after {piece.text[:begin][-30:]!r}, and --strict was asked for"
                    )
                n_lost += lost
            for split, writer in writers.items():
                mine = [n for n, piece in enumerate(pieces) if piece.split == split]
                parts = [np.append(ids[n], tail) if pieces[n].last else ids[n] for n in mine]
                ends = np.cumsum([part.size for part in parts], dtype=np.int64)
                last = np.array([pieces[n].last for n in mine], bool)
                n_bytes = sum(sources.size_of(pieces[n].text) for n in mine)
                writer.write(np.concatenate([tail[:0], *parts]), ends[last], n_bytes)
            n_batches += 1
            if time.monotonic() - saved >= CHECKPOINT_S:
                states = {split: writer.state() for split, writer in writers.items()}
                partial.save(batches=n_batches, splits=states, lost=n_lost)
                saved = time.monotonic()
            n_tokens = sum(writer.n_tokens for writer in writers.values())
            n_documents = sum(writer.n_documents for writer in writers.values())
            show(f"{counted(n_tokens, 'token')}  {counted(n_documents, 'document')}", done_bytes)
    if n_lost:
        splitter.source.problems[encoder.losses.what] = n_lost
    return writers


def merge(out: Path | str, *, resume: bool = False, note: Note = say) -> None:
    """Make the dataset `out` of its parts, whose hashes are verified and which stay.

    Parts are runs of the input in its order, so that their tokens follow on each other; where these
    are cut into shards is new, which is why they are copied.
    """
    place = store.place_of(out)
    parts, folders, metas, asked = parts_of(f"{place}.parts")
    problems = sum((Counter(meta["source"]["problems"]) for meta in metas), Counter[str]())
    with building(place, asked, resume=resume, note=note) as partial:
        if partial is None:
            return
        tokenizer = (folders[0] / "tokenizer.json").read_bytes()
        write_atomically(partial.dataset / "tokenizer.json", tokenizer)
        writers = _writers(partial, metas[0]["vocab_size"])
        shard_bytes = 12 * asked["source"]["shard_tokens"]  # with their ends
        fetched = ShardCache(partial.folder, 1 + 2 * shard_bytes / 2**30)
        for split, writer in writers.items():
            writer.n_bytes = sum(meta["splits"][split]["bytes"] for meta in metas)
            for part, meta in zip(parts, metas, strict=True):
                if meta["splits"][split]["tokens"]:
                    _copy_tokens(open_dataset(part, split, shard_cache=fetched), writer)
        n_documents = sum(map(_n_documents, metas))
        publish(partial, writers, metas[0]["end_of_text"], problems, n_documents, note)
    note(f"Merged {shown(place)}; {shown(place)}.parts is no longer needed")


def _n_documents(meta: Mapping[str, Any]) -> int:
    """Return the documents of a part's text; those cut in two count twice in older parts."""
    of_splits = sum(split["documents"] for split in meta["splits"].values())
    return int(meta["source"].get("n_documents", of_splits))


def _copy_tokens(dataset: TokenDataset, writer: ShardWriter) -> None:
    base = 0
    for shard in dataset.shards:
        ends = shard.document_ends()
        for start in range(0, shard.n_tokens, BLOCK_TOKENS):
            stop = min(start + BLOCK_TOKENS, shard.n_tokens)
            low, high = np.searchsorted(ends, (start, stop), "right")
            writer.write(dataset.read(base + start, stop - start), ends[low:high] - start)
        base += shard.n_tokens


class Bar(Progress):
    """How far it is, on standard error: a bar in a terminal, now and then a line elsewhere."""

    def __init__(self, n_bytes: int, visible: bool) -> None:
        columns = BarColumn(), TextColumn("{task.description}")
        console = Console(stderr=True, get_time=time.monotonic)
        hidden = not (visible and console.is_terminal)
        super().__init__(*columns, console=console, transient=True, disable=hidden)
        self._lines = visible and hidden
        self._said, self.n_bytes = time.monotonic(), n_bytes
        self.add_task("reading", total=n_bytes)

    def show(self, what: str, done_bytes: int | None) -> None:
        """What is being done, and how much of the input is; None: for a time nobody knows."""
        (task,) = self.tasks
        if done_bytes is None:
            return self.update(task.id, description=what)
        if done_bytes < task.completed:  # another pass
            self.reset(task.id)
        self.update(task.id, total=self.n_bytes, completed=done_bytes)
        left = "–" if task.time_remaining is None else timedelta(seconds=task.time_remaining)
        digits = 0 if self.n_bytes >= 10e6 else 1
        done, total = (f"{n / 1e6:,.{digits}f}" for n in (done_bytes, self.n_bytes))
        text = f"{done} of {total} MB  {what}  {left} left"
        self.update(task.id, description=text)
        now = time.monotonic()
        if self._lines and done_bytes > 0 and now - self._said >= LINE_S:
            self._said = now
            say(text, stream=sys.stderr)
