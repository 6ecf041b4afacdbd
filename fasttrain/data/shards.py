"""Shard files: little-endian token ids behind a 1,024-byte llm.c header, or bare (nanoGPT).

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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fasttrain.data.files import DataError, write_atomically

__all__ = ["Shard", "ShardScan", "TokenDataset", "dtype_for"]

HEADER_BYTES = 1024
KINDS: dict[int, tuple[int, np.dtype[Any]]] = {  # magic: (version, dtype)
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
}
BLOCK_BYTES = 8 << 20  # of a scan: large enough that Python's share of it is nothing
MAX_SHARD_TOKENS = 2**31 - 1  # the header's count is an int32


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

    def read_rows(self, rows: Sequence[memoryview], starts: Sequence[int]) -> None:
        """Fills each of `rows`, writable buffers of bytes, with the tokens from its start on.

        Raises:
            DataError: The file ends early or cannot be read.
        """
        fd, base, size, preadv = self._fd, self.offset_bytes, self.dtype.itemsize, os.preadv
        try:
            for row, start in zip(rows, starts, strict=True):
                done = preadv(fd, (row,), base + start * size)
                while done < len(row):
                    n = preadv(fd, (row[done:],), base + start * size + done)
                    if n == 0:
                        raise DataError(
                            f"{self.path}: ends at byte {base + start * size + done}, inside "
                            f"{len(row) // size} tokens from {start} on: truncated; restore the "
                            "file and resume from the last checkpoint"
                        )
                    done += n
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from error

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
            self.read_rows([block.data.cast("B")], [start])
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
            self.read_rows([part.data.cast("B")], [start])
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


class TokenDataset:
    """One split of a dataset: its shards as one long array of tokens, read from disk on demand.

    Attributes:
        n_tokens: Tokens of all shards.
        vocab_size: Every id is below it; None where neither dataset nor caller named one.
        max_token: The largest id there is.
        n_bytes: UTF-8 bytes of the text of the split, None where not recorded.
        n_documents: Documents, None where not recorded.
        end_of_text: The id that ends each document, None where not recorded.
        facts: What identifies it: hashes of shards (in order) and tokenizer, vocabulary, dtype.
        fingerprint: SHA-256 over these.
        tokenizer_path: The verified `tokenizer.json`, None for imports.
        reading: The file that is being read at this moment, None between reads.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        scans: Sequence[ShardScan],
        *,
        vocab_size: int | None,
        n_bytes: int | None = None,
        n_documents: int | None = None,
        end_of_text: int | None = None,
        tokenizer_path: Path | None = None,
        tokenizer_sha256: str | None = None,
    ) -> None:
        self.shards = tuple(shards)
        self.dtype: np.dtype[Any] = self.shards[0].dtype
        self._starts = np.cumsum([0, *(shard.n_tokens for shard in self.shards)], dtype=np.int64)
        self.n_tokens = int(self._starts[-1])
        self.vocab_size, self.n_bytes, self.n_documents = vocab_size, n_bytes, n_documents
        self.end_of_text, self.tokenizer_path = end_of_text, tokenizer_path
        self.max_token = max(scan.max_token for scan in scans)
        self.reading: Path | None = None
        self.facts: dict[str, Any] = {
            "vocab_size": vocab_size,
            "end_of_text": end_of_text,
            "dtype": self.dtype.str,
            "tokenizer": tokenizer_sha256,
            "shards": [scan.sha256 for scan in scans],
        }
        self.fingerprint = hashlib.sha256(json.dumps(self.facts).encode()).hexdigest()

    def read(self, start: int, count: int) -> NDArray[Any]:
        """Tokens [start, start + count), across shards.

        Returns:
            A fresh array, shape (count,), uint16 or uint32 as stored.

        Raises:
            DataError: The range is not within the split, or a file changed or cannot be read.
        """
        out = np.empty(count, self.dtype)
        self.read_windows([start], out.reshape(1, count))
        return out

    def read_windows(self, starts: Sequence[int], out: NDArray[Any]) -> None:
        """Reads one window per row.

        Args:
            starts: First token of each window, at least as many as `out` has rows.
            out: Filled; shape (rows, length), C-contiguous, of `self.dtype`.

        Raises:
            DataError: As for `read`.
        """
        rows, length = out.shape
        assert out.dtype == self.dtype
        assert out.flags.c_contiguous
        if not rows or not length:
            return
        low, high = min(starts[:rows]), max(starts[:rows])
        if low < 0 or high + length > self.n_tokens:
            raise DataError(
                f"tokens {low} to {high + length} were asked for; the split has {self.n_tokens}"
            )
        width = length * self.dtype.itemsize
        raw = out.data.cast("B")
        if len(self.shards) == 1:  # the general way below costs 30 µs a batch more
            shard = self.shards[0]
            self.reading = shard.path
            shard.check_unchanged()
            shard.read_rows(
                [raw[at : at + width] for at in range(0, rows * width, width)], starts[:rows]
            )
            self.reading = None
            return
        first = np.asarray(starts[:rows])
        index = np.searchsorted(self._starts, first, side="right") - 1
        whole = first + length <= self._starts[index + 1]
        for number in np.unique(index).tolist():
            shard = self.shards[number]
            self.reading = shard.path
            shard.check_unchanged()
            pick = np.flatnonzero((index == number) & whole)
            views = [raw[row * width : (row + 1) * width] for row in pick.tolist()]
            shard.read_rows(views, (first[pick] - self._starts[number]).tolist())
        for row in np.flatnonzero(~whole).tolist():
            self._read_across(
                raw[row * width : (row + 1) * width], int(first[row]), int(index[row])
            )
        self.reading = None

    def _read_across(self, view: memoryview, start: int, index: int) -> None:
        """Fills `view` with the window at `start`, which begins in shard `index` and leaves it."""
        size = self.dtype.itemsize
        while view:
            shard = self.shards[index]
            self.reading = shard.path
            shard.check_unchanged()
            at = start - int(self._starts[index])
            count = min(len(view) // size, shard.n_tokens - at)
            shard.read_rows([view[: count * size]], [at])
            view, start, index = view[count * size :], start + count, index + 1

    def will_need(self, start: int, count: int) -> None:
        """Asks the system to read a window ahead; a hint, within the split or ignored."""
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        if 0 <= index < len(self.shards):
            self.shards[index].will_need(start - int(self._starts[index]), count)
