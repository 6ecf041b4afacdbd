"""Writing shards: the counterpart of shards.py."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict

import numpy as np
from numpy.typing import NDArray

from fasttrain.config.untrusted import misfit
from fasttrain.data.files import DataError, sha256_of, write_atomically
from fasttrain.data.format import ShardInfo
from fasttrain.data.shards import HEADER_BYTES, KINDS, MAX_SHARD_TOKENS, dtype_for


class Progress(TypedDict):
    """How far a writer is."""

    shards: list[ShardInfo]
    in_shard: int
    ends_in_shard: int


class ShardWriter:
    """Writes one split as shards `<split>_000000.bin` …, with the ends of documents beside each.

    A shard becomes visible under its name only when it is complete and on disk. Documents run on
    over the border of two shards; an end lies beside the shard in which its document ends, as
    uint64 offset of the token after the document's last one, in `<split>_000000.ends`.
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
        self._in_shard = 0
        self._ends: list[NDArray[np.uint64]] = []
        self._file: Any = None
        if state is not None:
            self._restore(state)

    def state(self) -> dict[str, Any]:
        """Puts everything on disk and says how far that is, for a later writer to go on."""
        n_ends = 0
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            ends = np.concatenate(self._ends)
            self._ends, n_ends = [ends], ends.size
            write_atomically(self._path(".ends.partial"), ends.tobytes())
        return {
            "shards": self.shards,
            "in_shard": self._in_shard,
            "ends_in_shard": n_ends,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        remedy = "start anew without --resume"
        if problem := misfit(Progress, state, self.split):
            raise DataError(f"{self.folder}: of its progress, {problem}; {remedy}")
        self.shards, self._in_shard = list(state["shards"]), state["in_shard"]
        n_ends = state["ends_in_shard"]
        self.n_tokens = sum(shard["tokens"] for shard in self.shards) + self._in_shard
        self.n_documents = sum(shard["documents"] for shard in self.shards) + n_ends
        keep = {name for shard in self.shards for name in (shard["file"], shard["ends_file"])}
        if self._in_shard:
            n_bytes = HEADER_BYTES + self._in_shard * self.dtype.itemsize
            for suffix, size in ((".bin", n_bytes), (".ends", 8 * n_ends)):
                path = self._path(f"{suffix}.partial")
                if self._path(suffix).exists():  # finished since
                    os.replace(self._path(suffix), path)
                small = not path.is_file() or path.stat().st_size < size
                if small or self._in_shard >= self.shard_tokens:
                    raise DataError(f"{path}: missing or cut short; {remedy}")
                os.truncate(path, size)
                keep.add(path.name)
            self._file = self._path(".bin.partial").open("r+b", buffering=1 << 20)
            self._file.seek(n_bytes)
            self._ends = [np.fromfile(self._path(".ends.partial"), "<u8")]
        for path in self.folder.iterdir():
            if (
                path.name.startswith((f"{self.split}_", f".{self.split}_"))
                and path.name not in keep
            ):
                path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        elif self._file is not None:
            self._file.close()

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.split}_{len(self.shards):06d}{suffix}"

    def write(self, tokens: NDArray[Any], ends: Sequence[int] | NDArray[Any] = ()) -> None:
        """Appends tokens."""
        ids = np.asarray(tokens)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "ui"):
            raise DataError(f"tokens must be integers of shape (n,), got {ids.dtype} {ids.shape}")
        if ids.size and (int(ids.max()) >= self.vocab_size or int(ids.min()) < 0):
            first = int(np.flatnonzero((ids >= self.vocab_size) | (ids < 0))[0])
            at = self._in_shard + first
            shard = self.folder / (
                f"{self.split}_{len(self.shards) + at // self.shard_tokens:06d}.bin"
            )
            raise DataError(
                f"{shard}: token {int(ids[first])} at offset {at % self.shard_tokens} is outside "
                f"the vocabulary of {self.vocab_size}; use the tokenizer that the vocabulary "
                "belongs to"
            )
        stops = np.asarray(ends, dtype=np.int64)
        if stops.size and (np.any(np.diff(stops) < 0) or stops[0] < 0 or stops[-1] > ids.size):
            raise DataError("document ends must ascend within the tokens that they come with")
        done = 0
        while done < ids.size:
            part = ids[done : done + self.shard_tokens - self._in_shard]
            if self._file is None:
                self._file = self._path(".bin.partial").open("wb", buffering=1 << 20)
                self._file.write(bytes(HEADER_BYTES))
            self._file.write(np.ascontiguousarray(part, dtype=self.dtype))
            here = stops[(stops > done) & (stops <= done + part.size)]
            self._ends.append((here - done + self._in_shard).astype("<u8"))
            done += part.size
            self._in_shard += part.size
            self.n_tokens += part.size
            self.n_documents += here.size
            if self._in_shard == self.shard_tokens:
                self._finish()

    def _finish(self) -> None:
        magic = next(m for m, (_, dtype) in KINDS.items() if dtype == self.dtype)
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:3] = magic, KINDS[magic][0], self._in_shard
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        path, ends_path = self._path(".bin"), self._path(".ends")
        ends = np.concatenate(self._ends).tobytes() if self._ends else b""
        write_atomically(ends_path, ends)
        os.replace(self._path(".bin.partial"), path)
        self._path(".ends.partial").unlink(missing_ok=True)
        self.shards.append(
            ShardInfo(
                file=path.name,
                tokens=self._in_shard,
                sha256=sha256_of(path),
                documents=len(ends) // 8,
                ends_file=ends_path.name,
                ends_sha256=hashlib.sha256(ends).hexdigest(),
            )
        )
        self._in_shard, self._ends = 0, []

    def close(self) -> list[ShardInfo]:
        """Finishes the last shard."""
        if self._file is not None:
            self._finish()
        return self.shards
