"""What an input is: which files it means, and what is in them. Everything else here reads.

An input is a file, a folder, a glob, an address or standard input. One rule holds for all: links
are followed, hidden files and folders are left out unless they are named, a file counts once
however often it is named, and what cannot be read is an error. In a folder, or in an archive, files
of an unknown ending are taken only if they hold records or an archive.

What a file holds is decided by its first bytes, its name helps: a chain of compressions, then an
archive, Parquet, JSON, JSON lines or plain text, and the encoding of text. What is not sure is
refused with the option that settles it.
"""

import bz2
import codecs
import fnmatch
import glob
import gzip
import hashlib
import importlib
import io
import lzma
import math
import os
import re
import stat
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from tarfile import (  # type: ignore[attr-defined]
    EmptyHeaderError,
    EOFHeaderError,
    InvalidHeaderError,
    ReadError,
    TruncatedHeaderError,
)
from types import SimpleNamespace
from typing import IO, Any, NamedTuple, Self, cast

from fasttrain import storage as store
from fasttrain.config.untrusted import json_object
from fasttrain.storage import DataError, is_address, read_range, remote, shown

LISTING_S = 600.0  # that a remote folder may take to be listed
HEAD_BYTES = 1 << 16  # of a file's content, by which it is decided what it is
LONG_HEAD_BYTES = 1 << 23  # the same of a file whose first lines are longer records
LOOKERS = 16  # threads that look into files at addresses
TEXT_ENDINGS = (".txt", ".text", ".md", ".rst")
LINES_ENDINGS = (".jsonl", ".ndjson")
KNOWN = (*LINES_ENDINGS, ".parquet", *TEXT_ENDINGS)
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
FORMATS = ("text", "jsonl", "json", "parquet")
ARCHIVES = ("tar", "zip")
# Of a text: more of it that is not valid in its encoding is no accident. Fewer bytes say nothing.
MAX_BAD_SHARE, FEW_BAD = 0.001, 4

_COMPRESSIONS = {
    ".gz": re.compile(rb"\x1f\x8b\x08"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    ".bz2": re.compile(rb"BZh[1-9](?:\x31\x41\x59\x26\x53\x59|\x17\x72\x45\x38\x50\x90)"),
    ".xz": re.compile(rb"\xfd7zXZ\x00"),
}
_OTHERS = {  # that begin with these bytes and hold no text to read here
    b"\x04\x22\x4d\x18": "compressed by lz4",
    b"\xff\x06\x00\x00sNaPpY": "compressed by snappy",
    b"\x1f\x9d": "compressed by compress",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"ARROW1\x00\x00": "an Arrow file",
    b"Obj\x01": "an Avro file",
    b"SQLite format 3\x00": "an SQLite database",
    b"%PDF-": "a PDF document",
}
_BOMS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_KEY = r'"(?:[^"\\]|\\.)*"\s*:'
_OBJECT = re.compile(r"\{\s*" + _KEY)
_ARRAY = re.compile(r"\[\s*\{\s*(?:\}|" + _KEY + ")")
_ISO_2022 = re.compile(rb"\x1b\$([()]?)[@-D]")  # to a set of two bytes a character
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\r\f\v\b\x1b"))


class Content(NamedTuple):
    """What is in a file."""

    packed: tuple[str, ...] = ()  # compressions, the outermost first, by their endings
    format: str = "text"  # one of `FORMATS` or `ARCHIVES`
    encoding: str = "utf-8"  # of text and JSON


LeftOut = dict[str, dict[str, None]]  # reason → names, in order, each once


PLAIN = Content()


class UnclearError(DataError):
    """It is unclear what a file holds; the message names the option that settles it.

    `reason` is why a file in a folder is left out; None where it must not be.
    """

    def __init__(self, message: str, reason: str | None = "not text") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class File:
    """A file to read; its string is what may be shown of it."""

    path: Path | str  # a string is an address
    size: int
    version: int | str  # another one where the content is
    name: str = ""  # if the path does not show it
    content: Content | None = None  # None: not yet looked at
    opener: Callable[[], IO[bytes]] | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.name or shown(str(self.path))

    def open(self, buffer_bytes: int = 0) -> IO[bytes]:
        """Open it from its start; `buffer_bytes` are fetched at once of a file at an address."""
        if self.opener is not None:
            return self.opener()
        if isinstance(self.path, Path):
            return self.path.open("rb")
        if not self.size:
            _range(self, 0, 0)  # it must be as empty as was said
        # A file of fsspec, and all that it asks of its file system.
        ranges = SimpleNamespace(cat_file=lambda _, start, end: _range(self, start, end))
        spec = importlib.import_module("fsspec.spec")
        raw = spec.AbstractBufferedFile(ranges, str(self), cache_type="none", size=self.size)
        return cast(IO[bytes], io.BufferedReader(raw, buffer_bytes or store.RANGE_BYTES))

    def endings(self) -> tuple[str, str]:
        """Return format and compression by the endings of its name, as in (".jsonl", ".gz")."""
        suffixes = ["", *PurePosixPath(shown(str(self.path)).lower()).suffixes]
        compression = ""
        while suffixes[-1] in COMPRESSED:
            compression = compression or suffixes[-1]
            suffixes.pop()
        return suffixes[-1], compression

    def identity(self) -> list[str | int]:
        """Return name, size, and time of change, version or content."""
        is_local = isinstance(self.path, Path) and not self.name
        return [os.path.abspath(self.path) if is_local else str(self), self.size, self.version]

    def check_unchanged(self) -> None:
        """Refuse a file that was replaced or written to since it was found."""
        if self.opener is not None:
            return
        if isinstance(self.path, Path):
            now = local_file(self.path)
            same = (now.size, now.version) == (self.size, self.version)
        else:
            store.file_system(self.path)[0].invalidate_cache()
            now = _remote_file(self.path, remote(self.path, "info"))
            same = now.size == self.size and (now.version or "") == (self.version or "")
        if not same:
            remedy = "start again when nothing writes to it anymore"
            raise DataError(f"{self}: changed while it was read; {remedy}")


def local_file(path: Path) -> File:
    facts = path.stat()
    return File(path, facts.st_size, facts.st_mtime_ns)


class _Unnamed:
    """A file without a name, which is gone when nothing refers to it or the process ends."""

    def __init__(self) -> None:
        with tempfile.TemporaryFile() as file:
            self.descriptor = os.dup(file.fileno())

    def __del__(self) -> None:
        os.close(self.descriptor)

    def write(self, block: bytes) -> None:
        rest = memoryview(block)
        while rest:
            rest = rest[os.write(self.descriptor, rest) :]

    def open(self) -> IO[bytes]:
        return io.BufferedReader(_OwnPlace(self), 1 << 17)


class _OwnPlace(io.RawIOBase):
    """Reads a file without a name, from the start and without moving other readers."""

    def __init__(self, file: _Unnamed) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        size = os.fstat(self._file.descriptor).st_size
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        content = os.pread(self._file.descriptor, len(buffer), self._at)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def _copied(stream: IO[bytes], name: str) -> File:
    """Copy a stream, which can be read only once."""
    copy = _Unnamed()
    digest, size = hashlib.sha256(), 0
    while block := stream.read(1 << 20):
        copy.write(block)
        digest.update(block)
        size += len(block)
    return File(Path(name), size, digest.hexdigest(), name, None, copy.open)


@lru_cache(maxsize=4)  # a small file is read several times in a row, Parquet here and there
def _range(file: File, start: int, end: int) -> bytes:
    end = min(end, start + store.RANGE_BYTES, file.size)
    return read_range(str(file.path), start, end, file.size)


def _remote_file(address: str, info: dict[str, Any]) -> File:
    if info.get("size") is None:  # a link on a page comes without a size
        info = remote(address, "info")
    if info.get("size") is None:
        raise DataError(f"{shown(address)}: its server does not say how long it is; download it")
    names = ("ETag", "etag", "blob_id", "LastModified", "Last-Modified", "updated", "mtime")
    return File(address, info["size"], next((str(info[n]) for n in names if info.get(n)), ""))


class Found(NamedTuple):
    """The files that inputs mean, and what was left out of them."""

    files: list[File]
    left_out: LeftOut


class _Finder:
    """Collects files by what they are: device and inode, or address."""

    def __init__(self) -> None:
        self.files: dict[object, File] = {}
        self.in_folders: set[object] = set()  # of these, those of which only a folder was named
        self.touched: set[object] = set()  # those that the input at hand means
        self.folders: set[str] = set()  # inputs that are one
        self.left_out: LeftOut = {}

    def leave_out(self, reason: str, name: object) -> None:
        self.left_out.setdefault(reason, {})[str(name)] = None

    def add(self, key: object, file: File, *, in_folder: bool) -> None:
        self.touched.add(key)
        if key not in self.files:
            self.files[key] = file
            if in_folder:
                self.in_folders.add(key)
            return
        self.leave_out("named more than once", file)
        if not in_folder:
            self.in_folders.discard(key)

    def add_local(self, path: Path, *, in_folder: bool) -> None:
        facts = _facts(path)
        if stat.S_ISREG(facts.st_mode):
            file = File(path, facts.st_size, facts.st_mtime_ns)
            self.add((facts.st_dev, facts.st_ino), file, in_folder=in_folder)
        elif in_folder:
            self.leave_out("a pipe, socket or device", path)
        elif (facts.st_dev, facts.st_ino) not in self.files:  # as a shell makes of <(command)
            with path.open("rb") as stream:
                file = _copied(stream, str(path))
            self.add((facts.st_dev, facts.st_ino), file, in_folder=False)

    def walk(self, folder: Path, above: tuple[object, ...] = ()) -> Iterator[tuple[Path, bool]]:
        """Yield each file and folder below a folder, and whether it is a folder.

        Links are followed, but not to a folder that holds them.
        """
        facts = _facts(folder)
        key = (facts.st_dev, facts.st_ino)
        if key in above:
            return
        for name in _names_in(folder):
            path = folder / name
            if name.startswith("."):
                self.leave_out("hidden", path)
                continue
            is_folder = stat.S_ISDIR(_facts(path).st_mode)
            yield path, is_folder
            if is_folder:
                yield from self.walk(path, (*above, key))

    def matches(self, pattern: Path) -> Iterator[Path]:
        """Yield what fits a glob; `**` is any number of folders, none of them hidden."""
        parts = pattern.parts
        if "**" not in parts:
            yield from self.expanded(parts)
            return
        at = parts.index("**")
        rest = parts[at + 1 :] or ("*",)
        for root in self.expanded(parts[:at]) if at else [Path()]:
            if root.is_dir():
                folders = [root, *(path for path, is_folder in self.walk(root) if is_folder)]
                for folder in folders:
                    yield from self.matches(Path(glob.escape(str(folder)), *rest))

    def expanded(self, parts: Sequence[str]) -> list[Path]:
        """Return what fits a glob without `**`; `glob.glob` ignores folders it cannot list."""
        paths = [Path()]
        for part in parts:
            if not glob.has_magic(part):
                paths = [path / part for path in paths if os.path.lexists(path / part)]
                continue
            folders, paths = [path for path in paths if path.is_dir()], []
            for folder in folders:
                for name in fnmatch.filter(_names_in(folder), part):
                    if name.startswith(".") and not part.startswith("."):
                        self.leave_out("hidden", folder / name)
                    else:
                        paths.append(folder / name)
        return paths


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror})") from error


def _facts(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            problem = f"links to {os.readlink(path)!r}, which does not exist; remove the link"
        raise DataError(f"{path}: {problem}") from error


def _find_local(name: str, finder: _Finder) -> None:
    path = Path(os.path.expanduser(name))  # as it is where there is no such user
    if os.path.lexists(path):
        matches = [path]
        if path.is_dir():
            finder.folders.add(name)
    else:
        matches = list(finder.matches(path))
    paths: dict[Path, bool] = {}
    for match in matches:
        if stat.S_ISDIR(_facts(match).st_mode):
            for below, is_folder in finder.walk(match):
                if not is_folder:
                    paths.setdefault(below, True)
        else:
            paths[match] = False
    # A folder's in the order of names and folders, a glob's in that of their spelling.
    order = sorted(paths) if matches == [path] else sorted(paths, key=str)
    for below in order:
        finder.add_local(below, in_folder=paths[below])


def _find_remote(address: str, finder: _Finder) -> None:
    store.file_system(address)[0].invalidate_cache()  # what this process may have listed before
    web = address.startswith("http")
    path = address.partition("?")[0] if web else address
    magic = re.search(r"[*\[]" if web else r"[*?\[]", path)
    if magic is None:
        info = remote(address, "info")
        if info["type"] == "file" and not path.endswith("/"):
            finder.add(address, _remote_file(address, info), in_folder=False)
            return
        finder.folders.add(address)
        entries = list(_listed(path.rstrip("/") + "/", finder, in_folder=True))
        entries.sort(key=lambda entry: PurePosixPath(entry[0]))
    else:
        root = path[: path.rindex("/", 0, magic.start()) + 1]
        pattern = path[len(root) :]
        try:
            translated = importlib.import_module("fsspec.utils").glob_translate(pattern)
        except ValueError as error:
            remedy = "`**` stands for whole folders, as in **/*.jsonl"
            raise DataError(f"--input {shown(address)}: {error}; {remedy}") from error
        fits = re.compile(translated).match
        depth = math.inf if "**" in pattern else pattern.count("/") + 1
        entries = list(
            _listed(
                root,
                finder,
                fits=lambda name: fits(name[len(root) :]) is not None,
                depth=depth,
                hidden="/." in f"/{pattern}",
            )
        )
        entries.sort(key=lambda entry: entry[0])
    for name, info, in_folder in entries:
        finder.add(name, _remote_file(name, info), in_folder=in_folder)


def _listed(
    root: str,
    finder: _Finder,
    *,
    fits: Callable[[str], bool] = lambda name: False,
    depth: float = math.inf,
    hidden: bool = False,
    in_folder: bool = False,
) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Yield address, facts, and whether only its folder is named, of files in and below a folder.

    fsspec's own `glob` and `find` leave out, and say nothing of, folders that cannot be listed.
    """
    for info in remote(root, "ls", detail=True, timeout_s=LISTING_S):
        name = info["name"]
        name = name if is_address(name) else f"{root.partition(':')[0]}://{name}"
        if not name.startswith(root) or name == root:  # a link to elsewhere; the folder itself
            continue
        bare = name.rstrip("/")
        is_named = fits(bare)
        if bare[bare.rindex("/") + 1 :].startswith(".") and (in_folder or not hidden):
            if in_folder or is_named:
                finder.leave_out("hidden", shown(name))
        elif info["type"] != "directory":
            if is_named or in_folder:
                yield name, info, not is_named
        elif is_named or in_folder or depth > 1:
            yield from _listed(
                bare + "/",
                finder,
                fits=fits,
                depth=depth - 1,
                hidden=hidden,
                in_folder=is_named or in_folder,
            )


def find_files(inputs: Sequence[str], *, format: str = "auto", encoding: str = "auto") -> Found:
    """Return the files that the inputs mean, each once, with what they hold; and what is left out.

    In the order of the inputs, sorted within each. `format` is one of `FORMATS` or "auto",
    `encoding` is one of Python's or "auto".

    Raises:
        DataError: An input means no file, one cannot be read, or it is not sure what it holds.
    """
    finder = _Finder()
    keys_of: dict[str, set[object]] = {}
    for name in dict.fromkeys(inputs):
        finder.touched = set()
        if not name:
            raise DataError("--input '': names nothing; the current folder is --input .")
        if name == "-":
            if "-" not in finder.files:
                finder.add("-", _copied(sys.stdin.buffer, "standard input"), in_folder=False)
        elif is_address(name):
            _find_remote(name, finder)
        else:
            _find_local(name, finder)
        keys_of[name] = finder.touched
    keys = list(finder.files)
    files = [finder.files[key] for key in keys]
    look = partial(_looked, format=format, encoding=encoding)
    in_folder = [key in finder.in_folders for key in keys]
    if any(is_address(str(file.path)) for file in files):
        with ThreadPoolExecutor(LOOKERS) as pool:
            looked = list(pool.map(look, files, in_folder))
    else:
        looked = list(map(look, files, in_folder))
    kept: dict[object, File] = {}
    for key, (file, reason) in zip(keys, looked, strict=True):
        if reason:
            finder.leave_out(reason, file)
        else:
            kept[key] = file
    for name, its_keys in keys_of.items():
        if not its_keys & kept.keys():
            at, problem = shown(name), "no such file or folder, and no file matches it"
            if name in finder.folders or its_keys:
                problem = f"no file in it ends in {', '.join(KNOWN)} (or one of these and "
                problem += f"{', '.join(COMPRESSED)}) or holds records"
                problem += f" (left out: {told(finder.left_out)})" if finder.left_out else ""
                problem += f"; name others: --input '{at}/**/*.py'"
            raise DataError(f"--input {at}: {problem}")
    return Found(list(kept.values()), finder.left_out)


def told(left_out: LeftOut) -> str:
    """Return what was left out in words: how many for each reason, and some of their names."""
    parts = []
    for reason, names in left_out.items():
        first = [PurePosixPath(name).name for name in sorted(names)[:3]]
        first += ["…"] if len(names) > 3 else []
        parts.append(f"{len(names):,} {reason}: {', '.join(first)}")
    return "; ".join(parts)


def _looked(file: File, in_folder: bool, *, format: str, encoding: str) -> tuple[File, str]:
    """Return a file with its content, or why it is left out of its folder."""
    is_known = file.endings()[0] in KNOWN
    try:
        content = look(file, format=format, encoding=encoding)
    except UnclearError as error:
        if in_folder and not is_known and error.reason:
            return file, error.reason
        raise
    if in_folder and content.format == "text" and not is_known:
        return file, "with an unknown ending"
    return replace(file, content=content), ""


def look(file: File, *, format: str = "auto", encoding: str = "auto") -> Content:
    """Return what a file holds, by its first bytes and its name; `UnclearError` if not sure."""
    ending, compression = file.endings()
    with reading(file):
        packed: tuple[str, ...] = ()
        while True:
            head = _head(file, packed, HEAD_BYTES)
            kind = next((k for k, magic in _COMPRESSIONS.items() if magic.match(head)), None)
            if kind is None or len(packed) == 3:
                break
            packed += (kind,)
        if compression and not packed:
            if not file.size:  # cut off, as will be said where it is read
                return Content((compression,))
            if compression == ".zst":
                package("pyarrow", file)
            raise DataError(f"{file}: cannot be read (it is not compressed, as its name says)")
    is_whole = len(head) < HEAD_BYTES
    if head[257:262] == b"ustar" or _is_old_tar(head):
        return Content(packed, "tar")
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        if packed:
            raise UnclearError(f"{file}: a ZIP archive within a compressed file; unpack it")
        return Content(packed, "zip")
    if format != "auto":
        return Content(packed, format, _encoding(head, is_whole, file, encoding, sure=True))
    if head.startswith(b"PAR1") or ending == ".parquet":
        if packed:
            raise UnclearError(f"{file}: compressed Parquet; unpack it")
        return Content(packed, "parquet")
    for magic, what in _OTHERS.items():
        if head.startswith(magic):
            raise UnclearError(
                f"{file}: is {what}; unpack or convert it to text, JSON lines, Parquet"
            )
    encoding = _encoding(head, is_whole, file, encoding)
    text = _start(head, is_whole, encoding)
    if ending in TEXT_ENDINGS and _OBJECT.match(text) and len(_lines(text, is_whole)) < 2:
        with reading(file):
            head = _head(file, packed, LONG_HEAD_BYTES)
        is_whole = len(head) < LONG_HEAD_BYTES
        text = _start(head, is_whole, encoding)
    return Content(packed, _format(text, is_whole, ending, file), encoding)


def _is_old_tar(head: bytes) -> bool:
    """Return whether bytes begin with a header of tar before POSIX, which only a checksum shows."""
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _head(file: File, packed: Sequence[str], n_bytes: int) -> bytes:
    with file.open(n_bytes) as raw:
        return unpacked(raw, packed, file).read(n_bytes)


def _start(head: bytes, is_whole: bool, encoding: str) -> str:
    """Return the text that a file begins with, without its mark and the space before it."""
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    return decoder.decode(head, is_whole).removeprefix("\ufeff").lstrip()


def _lines(text: str, is_whole: bool) -> list[str]:
    """Return the lines of a text's beginning that are complete and not blank."""
    lines = text.split("\n")
    return [line for line in (lines if is_whole else lines[:-1]) if line.strip()]


def _is_single_byte(encoding: str) -> bool:
    """Return whether each byte is a character, as in cp1252."""
    new_decoder = codecs.getincrementaldecoder(encoding)
    return all(len(new_decoder("replace").decode(bytes([byte]))) == 1 for byte in range(256))


def _is_utf8(head: bytes, is_whole: bool) -> bool:
    """Return whether bytes are UTF-8 with characters of several bytes, which is no accident."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, is_whole)
    except UnicodeDecodeError:
        return False
    return not head.isascii()


def _encoding(
    head: bytes, is_whole: bool, file: File, named: str = "auto", *, sure: bool = False
) -> str:
    """Return the encoding of a text that begins with `head`; if `sure`, UTF-8 where in doubt.

    A `named` one is that of a text without a mark that is not certainly UTF-8.
    """
    for mark, name in _BOMS.items():
        if head.startswith(mark):
            return name
    if named in ("utf-16", "utf-32"):
        problem = f"has no byte order mark, which --encoding {named} expects"
        raise DataError(f"{file}: {problem}; name {named}-le or {named}-be")
    if named != "auto":
        return "utf-8" if _is_single_byte(named) and _is_utf8(head, is_whole) else named
    n_nul = head.count(0)
    if n_nul > MAX_BAD_SHARE * len(head):
        names = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
        guesses = [name for name in names if _is_plausible(head, is_whole, name)]
        if len(guesses) == 1 and len(head) >= 64:
            return guesses[0]
        # The bytes of little numbers lie at one side.
        even, odd = head[::2].count(0), head[1::2].count(0)
        if even > 20 * odd or odd > 20 * even:
            guesses = [name for name in guesses if name.endswith("le" if odd > even else "be")]
            if guesses:
                return guesses[0]
        if not sure:
            raise UnclearError(f"{file}: looks like binary data, not text; {_SETTLE}")
        return "utf-8"
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(head, is_whole)
    n_bad = text.count("\ufffd") - head.count(b"\xef\xbf\xbd")
    if sure:
        return "utf-8"
    # A file of records is taken whatever folder it is in
    reason = None if file.endings()[0] == ".json" else "not UTF-8"
    if escape := _ISO_2022.search(head):
        name = "iso2022_kr" if escape[1] == b")" else "iso2022_jp_2"
        problem = "switches character sets by escape sequences, as ISO-2022 does"
        remedy = f"name its encoding, as --encoding {name}"
        raise UnclearError(f"{file}: {problem}; {remedy}", reason)
    if len(head.translate(None, _CONTROLS)) < 0.95 * len(head):
        raise UnclearError(f"{file}: looks like binary data, not text; {_SETTLE}")
    if is_bad(n_bad, len(head)):
        raise UnclearError(f"{file}: {bad_text(n_bad, len(head))}; {_guess(head)}", reason)
    return "utf-8"


_SETTLE = "leave it out, or name what it is: --encoding NAME, --format NAME"


def is_bad(n_bad: int, n_bytes: int) -> bool:
    """Return whether a text has more bytes that are not valid than an accident explains."""
    return n_bad >= FEW_BAD and n_bad > MAX_BAD_SHARE * n_bytes


def bad_text(n_bad: int, n_bytes: int) -> str:
    share = 100 * n_bad / max(n_bytes, 1)
    return f"not UTF-8: {n_bad:,} of {n_bytes:,} bytes ({share:.2g} %) are not valid"


def _guess(head: bytes) -> str:
    """Return the options that settle what the encoding is, the likely ones first."""
    high = re.findall(rb"[\x80-\xff]+", head)
    western = sum(len(run) == 1 for run in high) > 0.8 * len(high)
    name = (
        "cp1252 (Windows, Latin-1) or cp1250, …" if western else "gb18030, shift_jis, utf-16-le, …"
    )
    return f"name its encoding: --encoding {name}; --encoding utf-8 replaces them by U+FFFD"


def _is_plausible(head: bytes, is_whole: bool, encoding: str) -> bool:
    """Return whether bytes are text in an encoding: valid, and no characters that no text has."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head, is_whole)
    except UnicodeDecodeError:
        return False
    odd = [c for c in set(text) - set("\t\n\r\f\v\ufeff") if unicodedata.category(c)[0] == "C"]
    return sum(map(text.count, odd)) <= MAX_BAD_SHARE * len(text)


def _format(start: str, is_whole: bool, ending: str, file: File) -> str:
    if _ARRAY.match(start):
        return "json"
    if ending in LINES_ENDINGS:
        return "json" if re.match(r"\{\s*\n\s*" + _KEY, start) else "jsonl"
    complete = _lines(start, is_whole)
    are_objects = [json_object(line) is not None for line in complete[:2]]
    if ending in TEXT_ENDINGS:  # one line alone may be an example of something
        return "jsonl" if are_objects == [True, True] else "text"
    if are_objects[:1] == [True] or (not complete and _OBJECT.match(start)):
        return "jsonl"
    if _OBJECT.match(start) or (ending == ".json" and re.match(r"\[\s*[\[\]\"{\d]", start)):
        return "json"
    if ending == ".json" and start:
        problem = "not JSON, as its name says"
        raise UnclearError(f"{file}: {problem}; name what it is: --format text", "not JSON")
    return "text"


# zipfile raises RuntimeError for what is encrypted, and a kind of it for an unknown compression.
_ARCHIVE_ERRORS = (tarfile.TarError, zipfile.BadZipFile, RuntimeError)


@contextmanager
def reading(file: File) -> Iterator[None]:
    """Name the file in errors of reading it, also where a document is read later."""
    try:
        yield
    except (OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError, *_ARCHIVE_ERRORS) as error:
        why: object = error
        text = str(error)
        if (
            isinstance(error, EOFError)
            or "Truncated compressed" in text
            or "unexpected end" in text
        ):
            why = "it is cut off: its compressed data has no end; get it anew"
        elif "too much memory" in text:
            why = "it was compressed with a window of more than 128 MiB; unpack it first: "
            why = f"{why}zstd -d --long=31 {file}"
        raise DataError(f"{file}: cannot be read ({why})") from error


def package(name: str, file: File) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"{file}: to read it run: pip install pyarrow") from error


class _Streams(io.RawIOBase):
    """Reads the compressed streams in a file, one after another.

    `BZ2File` and `LZMAFile` ignore whatever follows a stream and does not begin another.
    """

    def __init__(self, raw: IO[bytes], new_decoder: Callable[[], Any], padding: bytes) -> None:
        self._raw, self._new_decoder, self._padding = raw, new_decoder, padding
        self._decoder = new_decoder()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = b""
        while not content:
            block = self._decoder.unused_data if self._decoder.eof else b""
            if self._decoder.eof:
                while not (block := block.lstrip(self._padding)):
                    if not (block := self._raw.read(1 << 17)):
                        return 0
                self._decoder = self._new_decoder()
            elif self._decoder.needs_input and not (block := self._raw.read(1 << 17)):
                raise EOFError
            content = self._decoder.decompress(block, len(buffer))
        buffer[: len(content)] = content
        return len(content)


_OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": gzip.open,
    ".bz2": partial(_Streams, new_decoder=bz2.BZ2Decompressor, padding=b""),
    ".xz": partial(
        _Streams, new_decoder=partial(lzma.LZMADecompressor, lzma.FORMAT_XZ), padding=b"\0"
    ),
}


def unpacked(raw: IO[bytes], packed: Sequence[str], file: File) -> IO[bytes]:
    """Return what is in a file that is open, without its compressions."""
    if packed and not file.size:  # which would count as no text
        raise EOFError
    for kind in packed:
        if kind == ".zst":
            inner = package("pyarrow", file).CompressedInputStream(raw, "zstd")
        else:
            inner = _OPENERS[kind](raw)
        raw = cast(IO[bytes], io.BufferedReader(inner, 1 << 20))
    return raw


def members(
    file: File,
    content: Content,
    show: Callable[[int], None],
    leave_out: Callable[[str, str], None],
) -> Iterator[File]:
    """Yield the files in an archive, which are read before the next; call `show` with bytes read.

    As in a folder, hidden ones are left out; so are links. `leave_out` is called with the reason
    and the name. Files of a tar archive are copied to a temporary file.
    """

    def is_taken(name: str, is_link: bool) -> bool:
        reason = "a link" if is_link else "hidden" if _is_hidden(name) else ""
        if reason:
            leave_out(reason, f"{file}/{name}")
        return not reason

    with file.open() as raw:
        if content.format == "zip":
            with zipfile.ZipFile(raw) as archive:
                for info in archive.infolist():
                    is_link = stat.S_ISLNK(info.external_attr >> 16)
                    if not info.is_dir() and is_taken(info.filename, is_link):
                        opener = partial(archive.open, info)
                        yield _member(file, info.filename, info.file_size, opener)
                        show(raw.tell())
            return
        stream = unpacked(raw, content.packed, file)
        # After the blocks of zeros that end an archive, another may follow.
        with _Tape.open(fileobj=stream, mode="r|", ignore_zeros=True) as tape:
            for entry in tape:
                is_link = entry.issym() or entry.islnk()
                if not (entry.isreg() or is_link or entry.isdir()):
                    leave_out("a pipe, socket or device", f"{file}/{entry.name}")
                if (entry.isreg() or is_link) and is_taken(entry.name, is_link):
                    part = tape.extractfile(entry)
                    assert part is not None
                    copy = _Unnamed()
                    while block := part.read(1 << 20):
                        copy.write(block)
                    yield _member(file, entry.name, entry.size, copy.open)
                show(raw.tell())


class _Header(tarfile.TarInfo):
    """A header in a tar archive; `tarfile` takes one that is damaged for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        assert isinstance(tarfile, _Tape)
        try:
            header = super().fromtarfile(tarfile)
        except EOFHeaderError:
            tarfile.has_ended = True
            raise
        except EmptyHeaderError as error:
            if tarfile.has_ended:
                raise
            raise ReadError("it is cut off: the archive has no end; get it anew") from error
        except (InvalidHeaderError, TruncatedHeaderError) as error:
            raise ReadError(
                f"the archive is damaged at byte {tarfile.offset:,}: {error}"
            ) from error
        tarfile.has_ended = False
        return header


class _Tape(tarfile.TarFile):
    """A tar archive, or several one after another, in which what is damaged is an error."""

    tarinfo = _Header
    has_ended = False  # nothing but zeros has come since the last member


def _is_hidden(name: str) -> bool:
    parts = [part for part in PurePosixPath(name).parts if part != ".."]
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _member(file: File, name: str, size: int, opener: Callable[[], IO[bytes]]) -> File:
    return File(Path(name), size, "", f"{file}/{name}", None, opener)


class Transcoded(io.RawIOBase):
    """Reads a text of another encoding as UTF-8; calls `tell_bad` with the invalid bytes it has."""

    def __init__(self, stream: IO[bytes], encoding: str, tell_bad: Callable[[int], None]) -> None:
        self._stream, self._tell_bad = stream, tell_bad
        self._decoder = Decoder(encoding)
        self._rest = memoryview(b"")
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest and not self._ended:
            block = self._stream.read(HEAD_BYTES)
            self._ended = not block
            text, n_bad, _ = self._decoder.decode(block)
            if n_bad:
                self._tell_bad(n_bad)
            self._rest = memoryview(text.encode(errors="replace"))
        n_bytes = min(len(buffer), len(self._rest))
        buffer[:n_bytes] = self._rest[:n_bytes]
        self._rest = self._rest[n_bytes:]
        return n_bytes


class Decoder:
    """Decodes a text block by block; what is not valid, or NUL, becomes U+FFFD and counts."""

    def __init__(self, encoding: str) -> None:
        self._is_utf8 = codecs.lookup(encoding).name == "utf-8"
        name = "utf-8-sig" if self._is_utf8 else encoding
        self._decoder = codecs.getincrementaldecoder(name)()
        self._skips_mark = codecs.lookup(encoding).name.startswith(("utf-16-", "utf-32-"))

    def decode(self, block: bytes) -> tuple[str, int, int]:
        """Return the text, how many bytes are not valid, and the lines before the first of them."""
        decoder, state = self._decoder, self._decoder.getstate()
        try:
            text = decoder.decode(block, not block)
            if self._skips_mark and text:
                self._skips_mark = False
                text = text.removeprefix("\ufeff")
            # In bytes, a search for one takes a third of the time.
            if b"\0" not in block if self._is_utf8 else "\0" not in text:
                return text, 0, 0
            n_lines = text.partition("\0")[0].count("\n")
            return text.replace("\0", "\ufffd"), text.count("\0"), n_lines
        except UnicodeDecodeError as error:
            n_lines = error.object[: error.start].count(b"\n")
        texts = []
        for errors in ("ignore", "replace"):
            decoder.setstate(state)
            decoder.errors = errors
            texts.append(decoder.decode(block, not block))
        decoder.errors = "strict"
        n_bad = texts[1].count("\ufffd") - texts[0].count("\ufffd") + texts[1].count("\0")
        return texts[1].replace("\0", "\ufffd"), n_bad, n_lines

    def decode_all(self, content: bytes) -> tuple[str, int]:
        """Return a whole text, and how many of its bytes are not valid."""
        text, n_bad, _ = self.decode(content)
        rest, n_bad_at_end, _ = self.decode(b"")
        return text + rest, n_bad + n_bad_at_end
