"""Shard files: little-endian token ids behind a 1,024-byte llm.c header, or bare (nanoGPT).

The header is 256 int32: magic, version, token count, then zeros. Magic 20240520 with version 1 is
uint16, magic 20240801 with version 7 is uint32; llm.c and modded-nanogpt read and write the same.
Files are read with `preadv`, never mapped: a file that shrinks under a mapping kills the process
with SIGBUS.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fasttrain.data.files import DataError, write_atomically

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


class Shard:
    """An open shard file, read only; `dtype` is for files without header."""

    sha256: str  # of the file, header included, as hex; known when it has been scanned
    max_token: int  # −1 without tokens; known when it has been scanned
    # The file that says where its documents end, its SHA-256, and how many they are.
    ends: tuple[Path, str, int] | None = None

    def __init__(self, path: Path, *, dtype: str | None = None) -> None:
        if dtype not in (None, "uint16", "uint32"):
            raise DataError(f"data.dtype must be uint16 or uint32, got {dtype!r}")
        self.path = Path(path)
        try:
            # A pipe is opened at once, so that it can be refused.
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise DataError(f"{self.path}: not a file; put the shard itself there")
            self.identity = _identity(os.fstat(self._fd))
            self.dtype, self.offset_bytes, self.n_tokens = self._read_header(dtype)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be opened ({error.strerror})") from error

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
        """Refuse a file that was truncated, written to or replaced since it was opened.

        One `stat`, cheap enough for every batch; what was range-checked stays what is read.
        """
        try:
            same = _identity(os.stat(self.path)) == self.identity
        except OSError:
            same = False
        if not same:
            raise self._changed()

    def _changed(self) -> DataError:
        return DataError(
            f"{self.path}: truncated, replaced or removed while it was read; restore the file "
            "and resume from the last checkpoint"
        )

    def read_into(self, row: memoryview, start: int) -> None:
        """Fill `row`, a writable buffer of bytes, with the tokens from `start` on.

        Call `check_unchanged` after reading: a file that was replaced still reads as it was.
        """
        at = self.offset_bytes + start * self.dtype.itemsize
        try:
            while row:
                n = os.preadv(self._fd, (row,), at)
                if n == 0:
                    raise self._changed()
                row, at = row[n:], at + n
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from error

    def document_ends(self) -> NDArray[np.int64]:
        """Return where the documents in it end, ascending offsets into its tokens."""
        assert self.ends is not None
        path, sha256, documents = self.ends
        try:
            found = path.stat()
            fits = stat.S_ISREG(found.st_mode) and found.st_size == 8 * documents
            raw = path.read_bytes() if fits else b""
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        ends = np.frombuffer(raw, "<u8")
        sound = hashlib.sha256(raw).hexdigest() == sha256 and len(ends) == documents
        if not sound or (ends[1:] < ends[:-1]).any() or (ends > self.n_tokens).any():
            raise DataError(
                f"{path}: not the document ends of its shard: damaged or replaced; restore the "
                "file or prepare the text again"
            )
        return ends.astype(np.int64)

    def _blocks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield all tokens in blocks, each with the offset of its first token."""
        buffer = np.empty(BLOCK_BYTES // self.dtype.itemsize, self.dtype)
        for start in range(0, self.n_tokens, len(buffer)):
            block = buffer[: self.n_tokens - start]
            self.read_into(block.data.cast("B"), start)
            yield start, block

    def first_token_from(self, limit: int) -> tuple[int, int]:
        """Return (index, id) of the first token that is `limit` or larger; the scan has seen it."""
        for start, block in self._blocks():
            beyond = np.flatnonzero(block >= limit)
            if beyond.size:
                return start + int(beyond[0]), int(block[beyond[0]])
        raise self._changed()

    def scan(self, cache: Path) -> None:
        """Find hash and largest token of the whole file, from `cache` if the file is unchanged.

        An entry is void once the file's device, inode, size or one of its times has changed.
        """
        identity = [*self.identity, os.fstat(self._fd).st_ctime_ns]
        entry = cache / f"{hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()}.json"
        # No entry, or one that cannot be used, costs a scan.
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(entry.read_text())
            if kept["identity"] == identity and kept["dtype"] == self.dtype.str:
                self.sha256, self.max_token = str(kept["sha256"]), int(kept["max_token"])
                return
        digest = hashlib.sha256(os.pread(self._fd, self.offset_bytes, 0))
        self.max_token = -1
        for _, block in self._blocks():
            digest.update(block.data)
            self.max_token = max(self.max_token, int(block.max()))
        self.sha256 = digest.hexdigest()
        self.check_unchanged()
        kept = {"identity": identity, "dtype": self.dtype.str, "path": str(self.path)}
        kept |= {"sha256": self.sha256, "max_token": self.max_token}
        with suppress(OSError):  # a cache that cannot be written costs the next start one scan
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(entry, json.dumps(kept).encode())


def _identity(found: os.stat_result) -> list[int]:
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]
