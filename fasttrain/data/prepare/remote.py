"""Files at addresses, as a source reads them: found, and fetched by ranges, whole or not at all.

What a folder or a glob means, and in which order, is as on a disk.
"""

from __future__ import annotations

import importlib
import io
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import IO, Any, cast

from fasttrain.data.files import DataError, is_address, read_range, remote, shown

RANGE_BYTES = 8 << 20  # fetched at once; 140 kB/s are enough for it not to count as stalled
LISTING_S = 600.0  # that one folder may take to be listed


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at an address; its string is what may be shown of that."""

    address: str
    size: int
    version: str  # says, as its server does, when the content is another

    def __str__(self) -> str:
        return shown(self.address)

    def open(self, mode: str = "rb") -> IO[bytes]:
        return cast(IO[bytes], io.BufferedReader(_Ranges(self), 1 << 20))


class _Ranges(io.RawIOBase):
    """The bytes of a remote file, fetched when they are read."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = (0, self._at, self._file.size)[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._file.size > 0:
            return 0
        number, begin = divmod(self._at, RANGE_BYTES)
        part = memoryview(_range(self._file, number))[begin : begin + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


@lru_cache(maxsize=4)  # a small file is read several times in a row, Parquet here and there
def _range(file: RemoteFile, number: int) -> bytes:
    start = number * RANGE_BYTES
    return read_range(file.address, start, min(start + RANGE_BYTES, file.size), file.size)


def _remote_file(address: str, info: dict[str, Any]) -> RemoteFile:
    if info.get("size") is None:  # a link on a page
        info = remote(address, "info")
    if (size := info.get("size")) is None:
        raise DataError(
            f"{shown(address)}: its server does not say how long it is, so that nobody would see "
            "it end too early; download it and name the file"
        )
    names = ("ETag", "etag", "blob_id", "LastModified", "Last-Modified", "updated", "mtime")
    return RemoteFile(address, size, next((str(info[n]) for n in names if info.get(n)), ""))


def find_remote(address: str) -> tuple[bool, list[RemoteFile]]:
    """Return whether an address is that of a folder, and the files that it means, in order."""
    web = address.startswith("http")
    path = address.partition("?")[0] if web else address
    magic = re.search(r"[*\[]" if web else r"[*?\[]", path)
    if magic is None:
        info = remote(address, "info")
        if info["type"] == "file" and not path.endswith("/"):
            return False, [_remote_file(address, info)]
        files = [_remote_file(*entry) for entry in _listed(path.rstrip("/") + "/", math.inf)]
        return True, sorted(files, key=lambda file: PurePosixPath(file.address))
    root = path[: path.rindex("/", 0, magic.start()) + 1]
    pattern = path[len(root) :]
    depth = math.inf if "**" in pattern else pattern.count("/") + 1
    fits = re.compile(importlib.import_module("fsspec.utils").glob_translate(pattern)).match
    return False, [
        _remote_file(name, info)
        for name, info in sorted(_listed(root, depth), key=lambda entry: entry[0])
        if fits(below := name[len(root) :])
        and ("/." not in f"/{below}" or "/." in f"/{pattern}")  # hidden, as of a disk
    ]


def _listed(root: str, depth: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the address of each file in a folder and those below it, and what its server says.

    fsspec's own `glob` and `find` leave out folders that cannot be listed.
    """
    scheme = root.partition("://")[0]
    for info in remote(root, "ls", detail=True, timeout_s=LISTING_S):
        name = info["name"] if is_address(info["name"]) else f"{scheme}://{info['name']}"
        if not name.startswith(root) or name == root:  # a link to elsewhere; the folder itself
            continue
        if info["type"] != "directory":
            yield name, info
        elif depth > 1:
            yield from _listed(name.rstrip("/") + "/", depth - 1)
