"""From a splitter's pieces to a dataset on disk, with a place to resume from every few seconds.

A dataset OUT is built in `.OUT.partial` beside it:

    dataset/       what will be OUT: finished shards, tokenizer.json, and the shard being written
    progress.json  what was asked for, and how far everything in dataset/ can be trusted
    lock           held by the process at work

`progress.json` is replaced only when everything that it names is on disk. To resume, the input is
read again from its beginning, which takes little, and not encoded up to there. OUT keeps what was
asked for in `prepared.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Self, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from fasttrain.config.keys import counted
from fasttrain.config.untrusted import misfit, read_json
from fasttrain.data.files import DataError, lock, sha256_of, write_atomically
from fasttrain.data.format import DATASET_JSON, ShardInfo
from fasttrain.data.prepare.encode import Batch, Piece, Splitter, encoded
from fasttrain.data.shards import HEADER_BYTES, KINDS, MAX_SHARD_TOKENS, dtype_for
from fasttrain.data.tokenizer import Encoder

BATCH_CHARS = 4 << 20  # encoded at once: 100 MB of a process's memory, little time in handing over
CHECKPOINT_S = 5.0  # work that an interruption can cost
SPLITS, SUFFIXES = ("train", "val"), (".bin", ".ends")
PREPARED_JSON = "prepared.json"


class Progress(TypedDict):
    """How far a `ShardWriter` is."""

    shards: list[ShardInfo]
    in_shard: int
    ends_in_shard: int


class ShardWriter:
    """Writes one split as shards `<split>_000000.bin` …, with the ends of documents beside each.

    A shard becomes visible under its name only when it is complete and on disk. Documents run on
    over the border of two shards; an end lies beside the shard in which its document ends, as
    uint64 offset of the token after the document's last one, in `<split>_000000.ends`.

    With the `state` of a writer that is gone, it continues from there; whatever of the split is in
    the folder beyond that is removed.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        vocab_size: int,
        shard_tokens: int = 100_000_000,
        state: dict[str, Any] | None = None,
    ) -> None:
        if not 0 < shard_tokens <= MAX_SHARD_TOKENS:
            raise DataError(
                f"shard_tokens must be from 1 to {MAX_SHARD_TOKENS}, got {shard_tokens}"
            )
        self.folder, self.split, self.vocab_size = Path(folder), split, vocab_size
        self.dtype, self.shard_tokens = dtype_for(vocab_size), shard_tokens
        self.shards: list[ShardInfo] = []
        self.n_tokens = self.n_documents = 0
        self._in_shard = self._ends_in_shard = 0
        self._files: list[BinaryIO] = []  # tokens and ends of the shard that is being written
        if state is not None:
            self._restore(state)

    def _path(self, suffix: str, later: int = 0) -> Path:
        return self.folder / f"{self.split}_{len(self.shards) + later:06d}{suffix}"

    def _open(self, mode: str) -> None:
        self._files = [
            cast(BinaryIO, self._path(f"{suffix}.partial").open(mode, buffering=1 << 20))
            for suffix in SUFFIXES
        ]

    def _sync(self) -> None:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    def state(self) -> dict[str, Any]:
        """Put everything on disk and return how far that is, for a later writer."""
        self._sync()
        in_shard = {"in_shard": self._in_shard, "ends_in_shard": self._ends_in_shard}
        return {"shards": self.shards, **in_shard}

    def _restore(self, state: dict[str, Any]) -> None:
        remedy = "start anew without --resume"
        if problem := misfit(Progress, state, self.split):
            raise DataError(f"{self.folder}: of its progress, {problem}; {remedy}")
        self.shards, self._in_shard = list(state["shards"]), state["in_shard"]
        self._ends_in_shard = state["ends_in_shard"]
        self.n_tokens = sum(shard["tokens"] for shard in self.shards) + self._in_shard
        self.n_documents = sum(s["documents"] for s in self.shards) + self._ends_in_shard
        keep = {name for shard in self.shards for name in (shard["file"], shard["ends_file"])}
        if self._in_shard:
            sizes = (HEADER_BYTES + self._in_shard * self.dtype.itemsize, 8 * self._ends_in_shard)
            for suffix, size in zip(SUFFIXES, sizes, strict=True):
                path = self._path(f"{suffix}.partial")
                if self._path(suffix).exists():  # finished since
                    os.replace(self._path(suffix), path)
                small = not path.is_file() or path.stat().st_size < size
                if small or self._in_shard >= self.shard_tokens:
                    raise DataError(f"{path}: missing or cut short; {remedy}")
                os.truncate(path, size)
                keep.add(path.name)
            self._open("r+b")
            for file in self._files:
                file.seek(0, os.SEEK_END)
        for path in self.folder.iterdir():
            of_split = path.name.startswith((f"{self.split}_", f".{self.split}_"))
            if of_split and path.name not in keep:
                path.unlink()

    def write(self, tokens: NDArray[Any], ends: Sequence[int] | NDArray[Any] = ()) -> None:
        """Append tokens, with the ends of documents as ascending offsets into them."""
        ids, stops = np.asarray(tokens), np.asarray(ends, dtype=np.int64)
        if ids.size and (int(ids.max()) >= self.vocab_size or int(ids.min()) < 0):
            first = int(np.flatnonzero((ids >= self.vocab_size) | (ids < 0))[0])
            later, offset = divmod(self._in_shard + first, self.shard_tokens)
            raise DataError(
                f"{self._path('.bin', later)}: token {int(ids[first])} at offset {offset} is "
                f"outside the vocabulary of {self.vocab_size}; use the tokenizer that the "
                "vocabulary belongs to"
            )
        done = 0
        while done < ids.size:
            part = ids[done : done + self.shard_tokens - self._in_shard]
            if not self._files:
                self._open("wb")
                self._files[0].write(bytes(HEADER_BYTES))
            here = stops[(stops > done) & (stops <= done + part.size)]
            self._files[0].write(np.ascontiguousarray(part, dtype=self.dtype).data)
            self._files[1].write((here - done + self._in_shard).astype("<u8").tobytes())
            done += part.size
            self._in_shard += part.size
            self._ends_in_shard += here.size
            self.n_tokens += part.size
            self.n_documents += here.size
            if self._in_shard == self.shard_tokens:
                self._finish()

    def _finish(self) -> None:
        magic = next(m for m, (_, dtype) in KINDS.items() if dtype == self.dtype)
        header = np.array([magic, KINDS[magic][0], self._in_shard], "<i4")
        self._files[0].seek(0)
        self._files[0].write(header.tobytes())
        self._sync()
        self._close_files()
        path, ends_path = (self._path(suffix) for suffix in SUFFIXES)
        for suffix in reversed(SUFFIXES):  # the ends first: a shard that is there has its ends
            os.replace(self._path(f"{suffix}.partial"), self._path(suffix))
        self.shards.append(
            ShardInfo(
                file=path.name,
                tokens=self._in_shard,
                sha256=sha256_of(path),
                documents=self._ends_in_shard,
                ends_file=ends_path.name,
                ends_sha256=sha256_of(ends_path),
            )
        )
        self._in_shard = self._ends_in_shard = 0

    def _close_files(self) -> None:
        for file in self._files:
            file.close()
        self._files = []

    def close(self) -> list[ShardInfo]:
        """Finish the last shard; return all that were written, in order."""
        if self._files:
            self._finish()
        return self.shards

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self.close()
        else:
            self._close_files()


class Partial:
    """The folder in which a dataset is built, held by this process alone.

    `asked` is everything that shapes the output, input files included, as JSON values.
    """

    def __init__(
        self, out: Path, asked: dict[str, Any], *, resume: bool, note: Callable[[str], None]
    ) -> None:
        self.out, self.folder = out, out.parent / f".{out.name}.partial"
        self.dataset = self.folder / "dataset"  # what will be `out`
        self._progress, self._asked = self.folder / "progress.json", asked
        self.state: dict[str, Any] = {}  # of the last `save`
        self.complete = False  # whether `out` is there already, made as asked
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            if not (out / DATASET_JSON).is_file():
                raise DataError(
                    f"{out}: exists already and is not empty; name a new folder or remove it"
                )
            other = self._other_than_made() if resume else ""
            self.complete = resume and not other
            if not self.complete:
                raise DataError(
                    f"{out}: exists already and holds a dataset{other}; train on it as it is, "
                    "remove it, or name a new folder"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held = ExitStack()  # the lock
        try:
            self._held.callback(os.close, lock(self.folder / "lock"))
        except BlockingIOError:
            raise DataError(f"{out}: another process is preparing it now; wait for it") from None
        except OSError:  # a file system without locks
            pass
        try:
            if not self.complete:
                self._take_up(resume, note)
        except BaseException:
            self._held.close()
            raise

    def _take_up(self, resume: bool, note: Callable[[str], None]) -> None:
        """Read what is left, or make room."""
        if self._progress.exists():
            if resume:
                self._load()
                note(f"Going on with what an interrupted run left in {self.folder}")
            else:
                note(
                    f"Starting anew: {self.folder} of an interrupted run is replaced (--resume "
                    "would have gone on with it)"
                )
        elif resume:
            note(f"Nothing to resume: no interrupted run left {self.folder}; starting")
        if not self.state:
            shutil.rmtree(self.dataset, ignore_errors=True)
            self._progress.unlink(missing_ok=True)
        self.dataset.mkdir(exist_ok=True)
        for path in self.dataset.glob(".*"):  # files that were being written
            path.unlink()

    def _other_than_made(self) -> str:
        """Return how what is asked for differs from what the finished dataset was made of."""
        record = self.out / PREPARED_JSON
        if not record.exists():  # made by an earlier fasttrain
            return " that has no record of the files it was made of"
        try:
            other = self._other_than(read_json(record, "prepare it anew", DataError))
        except (DataError, ValueError, TypeError, KeyError, AttributeError) as error:
            return f" whose {PREPARED_JSON} is damaged ({error})"
        return other and f" made of something else: it had {other}"

    def _load(self) -> None:
        try:
            left = read_json(self._progress, "start anew without --resume", DataError)
            other, state = self._other_than(left["asked"]), left["state"]
        except (DataError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{self._progress}: damaged ({error}); start anew without --resume"
            ) from error
        if other:
            raise DataError(
                f"--resume: the interrupted run had {other}; repeat its command, or start anew "
                "without --resume"
            )
        self.state = state

    def _other_than(self, before: dict[str, Any]) -> str:
        """Return what was asked for `before` and is not now, in words; empty if all is the same."""
        asked = json.loads(json.dumps(self._asked))  # as it looks after being stored
        old, new = before["source"], asked["source"]
        for key in new:
            if key not in ("n_files", "n_bytes") and old.get(key) != new[key]:
                return f"{key} = {old.get(key)!r}, this one has {new[key]!r}"
        was, now = ({name: facts for name, *facts in a["files"]} for a in (before, asked))
        for name in was | now:
            if name not in was or name not in now:
                return f"other files: {name} is {'gone' if name in was else 'new'}"
            if was[name] != now[name]:
                return f"another {name} (its size, time of change or content)"
        if before["tokenizer_sha256"] != asked["tokenizer_sha256"]:
            return "another content of the tokenizer's file"
        return "" if before["recipe"] == asked["recipe"] else "another fasttrain or tokenizers"

    def save(self, **state: Any) -> None:
        """Record how far the work is; all of that must be on disk already."""
        self.state |= state
        content = json.dumps({"asked": self._asked, "state": self.state})
        write_atomically(self._progress, content.encode())

    def publish(self) -> None:
        """Give the finished dataset its name."""
        write_atomically(self.dataset / PREPARED_JSON, json.dumps(self._asked).encode())
        os.chmod(self.dataset, 0o755)
        _sync(self.dataset)
        os.rename(self.dataset, self.out)
        _sync(self.out.parent)
        self.state = {}

    def close(self) -> None:
        """Release the lock; remove the folder unless it can be resumed from."""
        if not self.state:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._held.close()


def _sync(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    """Encode what is not yet encoded, and write it; call `show` with each state and bytes read.

    Return for each split its closed writer and the bytes of its text. `OtherIdsError` says that
    tiktoken cannot be used on this text, `ChildProcessError` that a worker was killed.
    """
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
    """Return the error that names the first thing that the tokenizer has no token for."""
    begin, end = encoder.losses.first(piece.text)
    return DataError(
        f"{piece.where}: the tokenizer has no token for {piece.text[begin:end]!r} after "
        f"{piece.text[max(0, begin - 30) : begin]!r}, and --strict was asked for"
    )
