"""Shard files: little-endian token ids behind a 1,024-byte llm.c header, or bare (nanoGPT).

The header is 256 int32: magic, version, token count, then zeros. Magic 20240520 with version 1 is
uint16, magic 20240801 with version 7 is uint32; llm.c and modded-nanogpt read and write the same.
Nothing here touches a mapping: a file that shrinks under one kills the process with SIGBUS.
Windows are gathered by the kernel (gather.py), all of a batch in one call; what it cannot deliver
is read by `pread`, whose errors can be named.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
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


@dataclass(frozen=True, slots=True)
class ShardScan:
    """What one pass over a whole shard found."""

    sha256: str  # of the file, header included, as hex
    max_token: int  # −1 without tokens


class Shard:
    """An open shard file, read only; `dtype` is for files without header."""

    def __init__(self, path: Path, *, dtype: str | None = None) -> None:
        if dtype not in (None, "uint16", "uint32"):
            raise DataError(f"data.dtype must be uint16 or uint32, got {dtype!r}")
        self.path = Path(path)
        try:
            # A pipe is opened at once, so that it can be refused.
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be opened ({error.strerror})") from error
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise DataError(f"{self.path}: not a file; put the shard itself there")
            self._identity = _identity(os.fstat(self._fd))
            self.dtype, self.offset_bytes, self.n_tokens = self._read_header(dtype)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from error
        self._mapped: NDArray[np.uint8] | None = None  # from the first gathering on

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
            same = _identity(os.stat(self.path)) == self._identity
        except OSError:
            same = False
        if not same:
            raise DataError(
                f"{self.path}: truncated, replaced or removed while it was read; restore the file "
                "and resume from the last checkpoint"
            )

    def gather(
        self,
        starts: NDArray[np.int64],
        addresses: NDArray[np.int64] | int,
        counts: NDArray[np.int64] | int,
    ) -> bool:
        """Copy the tokens of windows to `addresses`; False: use `read_rows` instead (see `gather`).

        Call `check_unchanged` afterwards: where a file was cut off, the rest of its last page
        reads as zeros.
        """
        if self._mapped is None:
            try:
                raw = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):
                return False
            self._mapped = np.frombuffer(raw, np.uint8)
        size = self.dtype.itemsize
        base = self._mapped.ctypes.data + self.offset_bytes
        return gather(base + starts * size, addresses, counts * size)

    def read_rows(self, rows: Sequence[memoryview], starts: Sequence[int]) -> None:
        """Fill each of `rows`, writable buffers of bytes, with the tokens from its start on."""
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

    def first_token_from(self, limit: int) -> tuple[int, int] | None:
        """Return (index, id) of the first token that is `limit` or larger, if there is one."""
        step = BLOCK_BYTES // self.dtype.itemsize
        for start in range(0, self.n_tokens, step):
            block = np.empty(min(step, self.n_tokens - start), self.dtype)
            self.read_rows([block.data.cast("B")], [start])
            beyond = np.flatnonzero(block >= limit)
            if beyond.size:
                return start + int(beyond[0]), int(block[beyond[0]])
        return None

    def scan(self, cache: Path | None) -> ShardScan:
        """Return hash and largest token of the whole file, from `cache` if the file is unchanged.

        An entry is void once the file's device, inode, size or one of its times has changed.
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


def _identity(found: os.stat_result) -> list[int]:
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]


MAX_PIECES = 1024  # IOV_MAX of Linux


@cache
def _process_vm_readv() -> Callable[..., int] | None:
    """Return the C library's function, which only Linux has."""
    function = getattr(ctypes.CDLL(None), "process_vm_readv", None)
    if function is None:
        return None
    pieces = (ctypes.c_void_p, ctypes.c_ulong)
    function.argtypes = (ctypes.c_int, *pieces, *pieces, ctypes.c_ulong)
    function.restype = ctypes.c_ssize_t
    called: Callable[..., int] = function
    return called


def gather(
    sources: NDArray[np.int64], addresses: NDArray[np.int64] | int, sizes: NDArray[np.int64] | int
) -> bool:
    """Copy pieces of this process's memory, which may be of mappings that have lost their file.

    `addresses` says where each goes, or where all go side by side; `sizes` are bytes of each, or of
    all. False: the system lacks or forbids the call, or not all was copied; what lies at the
    addresses is then undefined.
    """
    function = _process_vm_readv()
    if function is None:
        return False
    n_pieces, pid = len(sources), os.getpid()
    there = np.empty((n_pieces, 2), np.uint64)  # as the C library's struct iovec
    there[:, 0], there[:, 1] = sources, sizes
    here = there
    if not isinstance(addresses, int):
        here = there.copy()
        here[:, 0] = addresses
    for first in range(0, n_pieces, MAX_PIECES):
        n = min(n_pieces - first, MAX_PIECES)
        total = sizes * n if isinstance(sizes, int) else int(sizes[first : first + n].sum())
        n_here, into = n, here[first:]
        if isinstance(addresses, int):
            n_here, into = 1, np.array([[addresses, total]], np.uint64)
            addresses += total
        if function(pid, into.ctypes.data, n_here, there[first:].ctypes.data, n, 0) != total:
            return False
    return True
