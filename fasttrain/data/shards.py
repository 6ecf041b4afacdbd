"""One shard file: little-endian token ids behind a 1,024-byte llm.c header, or bare (nanoGPT).

The header is 256 int32: magic, version, token count, then zeros. Magic 20240520 with version 1 is
uint16, magic 20240801 with version 7 is uint32; llm.c and modded-nanogpt read and write the same.
Shards are read with `pread`, never mapped: a file that shrinks under a mapping kills the process
with SIGBUS, a short `pread` is an error that can be named. On windows of 1,025 tokens in page
cache it is also the faster of the two (940 against 520 million tokens/s, one core).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fasttrain.data.files import DataError, sha256_of, write_atomically

__all__ = ["Shard", "ShardInfo", "ShardScan", "ShardWriter", "dtype_for"]

HEADER_BYTES = 1024
KINDS: dict[int, tuple[int, np.dtype[Any]]] = {  # magic: (version, dtype)
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
}
BLOCK_BYTES = 8 << 20  # of a scan: large enough that Python's share of it is nothing
MAX_SHARD_TOKENS = 2**31 - 1  # the header's count is an int32

Tokens = NDArray[np.unsignedinteger[Any]]


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The smallest dtype a shard can have for ids below `vocab_size`."""
    if not 0 < vocab_size <= 2**32:
        raise DataError(f"vocab_size must be from 1 to 2**32, got {vocab_size}")
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


@dataclass(frozen=True, slots=True)
class ShardScan:
    """What one pass over a whole shard found.

    Attributes:
        sha256: Of the file, header included, as hex.
        max_token: The largest id in it, −1 without tokens.
    """

    sha256: str
    max_token: int


class Shard:
    """An open shard file, read only.

    Args:
        path: The file.
        dtype: "uint16" or "uint32" for a file without header; checked against a header if there
            is one. None: a header is required.

    Raises:
        DataError: The file is missing, its header is not one this reads, or its size is not what
            the header says. Names the file.
    """

    def __init__(self, path: Path, *, dtype: str | None = None) -> None:
        if dtype not in (None, "uint16", "uint32"):
            raise DataError(f"data.dtype must be uint16 or uint32, got {dtype!r}")
        self.path = Path(path)
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be opened ({error.strerror})") from error
        try:
            self._identity = _identity(os.fstat(self._fd))
            self.dtype, self.offset_bytes, self.n_tokens = self._read_header(dtype)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from error

    def __del__(self) -> None:
        if (fd := self.__dict__.get("_fd")) is not None:  # unset where opening failed
            os.close(fd)

    def _read_header(self, dtype: str | None) -> tuple[np.dtype[Any], int, int]:
        size = os.fstat(self._fd).st_size
        raw = os.pread(self._fd, HEADER_BYTES, 0)
        magic = int.from_bytes(raw[:4], "little")
        if magic not in KINDS:
            if dtype is None:
                raise DataError(
                    f"{self.path}: not a token shard: its first number is {magic}, expected "
                    f"{' or '.join(map(str, KINDS))}; for a headerless .bin name the type of its "
                    'tokens: data.dtype = "uint16" or "uint32"'
                )
            bare: np.dtype[Any] = np.dtype(dtype).newbyteorder("<")
            if size % bare.itemsize:
                raise DataError(
                    f"{self.path}: {size} bytes are no whole number of {dtype} tokens; the file is "
                    "cut off or data.dtype is wrong"
                )
            return bare, 0, size // bare.itemsize
        if len(raw) < HEADER_BYTES:
            raise DataError(f"{self.path}: cut off inside its header, at {len(raw)} bytes")
        header = np.frombuffer(raw, dtype="<i4")
        version, kind = KINDS[magic]
        count = int(header[2])
        if header[1] != version:
            raise DataError(
                f"{self.path}: version {header[1]} of format {magic}, expected {version}; write "
                "the shard again with a current tool"
            )
        if dtype is not None and kind != np.dtype(dtype):
            raise DataError(
                f"{self.path}: its header says {kind.name}, data.dtype says {dtype}; remove "
                "data.dtype, it is for files without header"
            )
        expected = HEADER_BYTES + count * kind.itemsize
        if count < 0 or size != expected or header[3:].any():
            raise DataError(
                f"{self.path}: damaged: its header announces {count} tokens, {expected} bytes, and "
                f"the file has {size} bytes; prepare or download it again"
            )
        return kind, HEADER_BYTES, count

    def check_unchanged(self) -> None:
        """Raises DataError if the file was truncated, written to or replaced since it was opened.

        One `stat`, cheap enough for every batch; what was range-checked stays what is read.
        """
        try:
            same = _identity(os.stat(self.path)) == self._identity
        except OSError:
            same = False
        if not same:
            raise DataError(
                f"{self.path}: truncated, replaced or removed while it was read; restore the file "
                "and resume from the last checkpoint"
            )

    def read_into(self, row: memoryview, start: int) -> None:
        """Reads tokens from `start` on into `row`, a writable buffer of bytes, filling it.

        Raises:
            DataError: The file ends early or cannot be read.
        """
        offset = self.offset_bytes + start * self.dtype.itemsize
        done = 0
        while done < len(row):
            try:
                n = os.preadv(self._fd, (row[done:] if done else row,), offset + done)
            except OSError as error:
                raise DataError(f"{self.path}: cannot be read ({error.strerror})") from error
            if n == 0:
                raise DataError(
                    f"{self.path}: ends at byte {offset + done} while token {start} and following "
                    "were read: truncated; restore the file and resume from the last checkpoint"
                )
            done += n

    def will_need(self, start: int, count: int) -> None:
        """Asks the system to read `count` tokens from `start` on ahead."""
        if hasattr(os, "posix_fadvise"):
            size = self.dtype.itemsize
            offset = self.offset_bytes + start * size
            os.posix_fadvise(self._fd, offset, count * size, os.POSIX_FADV_WILLNEED)

    def first_token_from(self, limit: int) -> tuple[int, int] | None:
        """(index, id) of the first token that is `limit` or larger, None if there is none."""
        step = BLOCK_BYTES // self.dtype.itemsize
        for start in range(0, self.n_tokens, step):
            block = np.empty(min(step, self.n_tokens - start), self.dtype)
            self.read_into(block.data.cast("B"), start)
            beyond = np.flatnonzero(block >= limit)
            if beyond.size:
                return start + int(beyond[0]), int(block[beyond[0]])
        return None

    def scan(self, cache: Path | None) -> ShardScan:
        """Hash and largest token of the whole file, from `cache` if the file is unchanged.

        Args:
            cache: A folder; the result is kept there under the file's path, with its device,
                inode, size and times of change, any of which voids it. None: nothing is kept.
        """
        identity = [*self._identity, os.fstat(self._fd).st_ctime_ns]
        name = hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()
        entry = None if cache is None else cache / f"{name}.json"
        if entry is not None:
            try:
                kept = json.loads(entry.read_text())
                if kept["identity"] == identity and kept["dtype"] == self.dtype.str:
                    return ShardScan(str(kept["sha256"]), int(kept["max_token"]))
            except (OSError, ValueError, KeyError, TypeError):
                pass  # no entry, or one that cannot be used: scan
        digest = hashlib.sha256(os.pread(self._fd, self.offset_bytes, 0))
        largest = -1
        block = np.empty(BLOCK_BYTES // self.dtype.itemsize, self.dtype)
        for start in range(0, self.n_tokens, len(block)):
            part = block[: self.n_tokens - start]
            self.read_into(part.data.cast("B"), start)
            digest.update(part.data)
            largest = max(largest, int(part.max()))
        result = ShardScan(digest.hexdigest(), largest)
        self.check_unchanged()
        if entry is not None:
            kept = {"identity": identity, "dtype": self.dtype.str, "path": str(self.path)}
            kept |= {"sha256": result.sha256, "max_token": largest}
            try:
                entry.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(entry, json.dumps(kept).encode())
            except OSError:
                pass  # a cache that cannot be written costs the next start one scan
        return result


def _identity(stat: os.stat_result) -> list[int]:
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns]


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """A finished shard, as `dataset.json` lists it."""

    file: str
    tokens: int
    sha256: str
    documents: int
    ends_file: str
    ends_sha256: str


class ShardWriter:
    """Writes one split as shards `<split>_000000.bin` …, with the ends of documents beside each.

    A shard becomes visible under its name only when it is complete and on disk. Documents run on
    over the border of two shards; an end lies beside the shard in which its document ends, as
    uint64 offset of the token after the document's last one, in `<split>_000000.ends`.

    Args:
        folder: Where to; must exist.
        split: "train" or "val", the first part of each name.
        vocab_size: Ids must be below it; also settles the dtype.
        shard_tokens: Tokens of every shard but the last.
    """

    def __init__(
        self, folder: Path, split: str, *, vocab_size: int, shard_tokens: int = 100_000_000
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
        """Appends tokens.

        Args:
            tokens: Ids, any integer dtype, shape (n,).
            ends: Ascending offsets into `tokens`, each just after a document's last token.

        Raises:
            DataError: An id is outside the vocabulary; names file and offset. Nothing of the call
                is written then.
        """
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
        """Finishes the last shard.

        Returns:
            All shards written, in order.
        """
        if self._file is not None:
            self._finish()
        return self.shards
