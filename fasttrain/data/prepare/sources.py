"""Text from files and addresses: plain, JSON lines, Parquet, compressed; folders, globs, stdin.

One plain file is one document; a line of JSON or a row of Parquet is one. Nothing is held that
grows with the input: a large file is read, decoded and given out in pieces, again for each pass.
What cannot be read as asked is counted under its reason, or, if strict, ends the run with file and
line. `Splitter` says which pieces are for training, and which for validation.
"""

import atexit
import codecs
import glob
import gzip
import hashlib
import importlib
import io
import math
import os
import re
import shutil
import sys
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, islice
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from fasttrain.config.untrusted import json_object
from fasttrain.data import files as store
from fasttrain.data.files import DataError, is_address, read_range, remote, sha256_of, shown

PIECE_CHARS = 1 << 18  # of a document: small enough to share out, large enough to lose no time
LISTING_S = 600.0  # that a remote folder may take to be listed
KNOWN = (".jsonl", ".parquet", ".txt", ".text", ".md", ".rst")
COMPRESSED = (".gz", ".zst")
# Where a text may be cut so that no word of a byte-level BPE spans the cut: after a line's end and
# before something that is not space; in a line too long for that, before a single space.
_CUT_LINE = re.compile(r"\n(?=\S)")
_CUT_WORD = re.compile(r"(?<=\S)(?= \S)")

FEW_VAL_TOKENS = 5_000  # to validate on: the loss of fewer says little
# Held out where nobody says how much: 0.5 %, of a text that this is too little of 100 kB, which are
# some 25,000 tokens, but never more than a tenth.
VAL_FRACTION, VAL_BYTES, MAX_VAL_FRACTION = 0.005, 100_000, 0.1
SMALL_BYTES = 20_000_000  # from here on 0.5 % are 100 kB
_BINS = 4096

INVALID_UTF8 = "documents with invalid UTF-8 (the bytes replaced by U+FFFD)"
EMPTY = "empty documents (left out)"
NOT_JSON = "lines that are not a JSON object (left out)"


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it came from."""

    where: str  # file, and line or row
    pieces: Callable[[], Iterator[str]]  # its text from the start, in pieces as `_pieces` cuts it


@dataclass(frozen=True, slots=True)
class File:
    """A file to read; its string is what may be shown of it."""

    path: Path | str  # a string is an address
    size: int
    version: int | str  # another one where the content is
    name: str = ""  # where the path does not say it

    def __str__(self) -> str:
        return self.name or shown(str(self.path))

    def open(self) -> IO[bytes]:
        if isinstance(self.path, Path):
            return self.path.open("rb")
        if not self.size:
            _range(self, 0, 0)  # it must be as empty as was said
        # A file of fsspec, and all that it asks of its file system.
        ranges = SimpleNamespace(cat_file=lambda _, start, end: _range(self, start, end))
        spec = importlib.import_module("fsspec.spec")
        raw = spec.AbstractBufferedFile(ranges, str(self), cache_type="none", size=self.size)
        return cast(IO[bytes], io.BufferedReader(raw, store.RANGE_BYTES))

    def kind(self) -> tuple[str, str]:
        """Return format and compression by the endings of its name, as in (".jsonl", ".gz")."""
        *_, first, last = ["", "", *PurePosixPath(shown(str(self.path)).lower()).suffixes]
        return (first, last) if last in COMPRESSED else (last, "")

    def identity(self) -> list[str | int]:
        """Return name, size, and time of change, version or content."""
        is_local = isinstance(self.path, Path) and not self.name
        return [os.path.abspath(self.path) if is_local else str(self), self.size, self.version]


def local_file(path: Path) -> File:
    found = path.stat()
    return File(path, found.st_size, found.st_mtime_ns)


def _standard_input() -> File:
    """Copy standard input; its first line says whether it is JSON lines."""
    first = sys.stdin.buffer.readline()
    kind = ".txt" if json_object(first) is None else ".jsonl"
    with tempfile.NamedTemporaryFile(suffix=kind, delete=False) as copy:
        path = Path(copy.name)
        atexit.register(path.unlink, missing_ok=True)
        copy.write(first)
        shutil.copyfileobj(sys.stdin.buffer, copy, 1 << 20)
    return File(path, path.stat().st_size, sha256_of(path), "standard input")


@lru_cache(maxsize=4)  # a small file is read several times in a row, Parquet here and there
def _range(file: File, start: int, end: int) -> bytes:
    end = min(end, start + store.RANGE_BYTES, file.size)
    return read_range(str(file.path), start, end, file.size)


def _remote_file(address: str, info: dict[str, Any]) -> File:
    if info.get("size") is None:  # a link on a page
        info = remote(address, "info")
    if info.get("size") is None:
        raise DataError(f"{shown(address)}: its server does not say how long it is; download it")
    names = ("ETag", "etag", "blob_id", "LastModified", "Last-Modified", "updated", "mtime")
    return File(address, info["size"], next((str(info[n]) for n in names if info.get(n)), ""))


def _remote_files(address: str) -> tuple[bool, list[File]]:
    """Return whether an address is a folder's, and the files that it means, as those of a disk."""
    store.file_system(address)[0].invalidate_cache()  # what this process may have listed before
    web = address.startswith("http")
    path = address.partition("?")[0] if web else address
    magic = re.search(r"[*\[]" if web else r"[*?\[]", path)
    if magic is None:
        info = remote(address, "info")
        if info["type"] == "file" and not path.endswith("/"):
            return False, [_remote_file(address, info)]
        found = [_remote_file(*entry) for entry in _listed(path.rstrip("/") + "/", math.inf)]
        return True, sorted(found, key=lambda file: PurePosixPath(file.path))
    root = path[: path.rindex("/", 0, magic.start()) + 1]
    pattern = path[len(root) :]
    fits = re.compile(importlib.import_module("fsspec.utils").glob_translate(pattern)).match
    depth = math.inf if "**" in pattern else pattern.count("/") + 1
    hidden = "/." in f"/{pattern}"
    return False, [
        _remote_file(name, info)
        for name, info in sorted(_listed(root, depth), key=lambda entry: entry[0])
        if fits(below := name[len(root) :]) and (hidden or "/." not in f"/{below}")
    ]


def _listed(root: str, depth: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield address and facts of each file in a folder and those below it.

    fsspec's own `glob` and `find` leave out, and say nothing of, folders that cannot be listed.
    """
    for info in remote(root, "ls", detail=True, timeout_s=LISTING_S):
        name = info["name"]
        name = name if is_address(name) else f"{root.partition(':')[0]}://{name}"
        if not name.startswith(root) or name == root:  # a link to elsewhere; the folder itself
            continue
        if info["type"] != "directory":
            yield name, info
        elif depth > 1:
            yield from _listed(name.rstrip("/") + "/", depth - 1)


def find_files(inputs: Sequence[str]) -> tuple[list[File], list[File]]:
    """Return the files that the inputs mean, and those in folders whose endings are unknown.

    In the order of the inputs, sorted within each, each once.
    """
    found: dict[File, None] = {}
    passed_over: list[File] = []
    for name in dict.fromkeys(inputs):
        if name == "-":
            is_folder, files = False, [_standard_input()]
        elif is_address(name):
            is_folder, files = _remote_files(name)
        else:
            path = Path(name).expanduser()
            is_folder = path.is_dir()
            matches = sorted(path.rglob("*")) if is_folder else [path]
            if not path.exists():
                matches = list(map(Path, sorted(glob.glob(str(path), recursive=True))))
            files = [local_file(file) for file in matches if file.is_file()]
        if is_folder:
            passed_over += [file for file in files if file.kind()[0] not in KNOWN]
            files = [file for file in files if file.kind()[0] in KNOWN]
        if not files:
            at, problem = shown(name), "no such file or folder, and no file matches it"
            if is_folder:
                problem = f"no file in it ends in {', '.join(KNOWN)} (or one of these and "
                problem += f"{' or '.join(COMPRESSED)}); name others: --input '{at}/**/*.py'"
            raise DataError(f"--input {at}: {problem}")
        found |= dict.fromkeys(files)
    return list(found), passed_over


class Source:
    """The documents of some files, as often as asked for; if `strict`, a problem is a DataError."""

    def __init__(self, files: Sequence[File], *, field: str = "text", strict: bool = False) -> None:
        self.files = files
        self.n_bytes = sum(file.size for file in files)
        self.field, self.strict = field, strict
        self.problems: Counter[str] = Counter()  # of the pass now running or last run, by reason
        self.done_bytes = 0  # of `n_bytes`, read by this pass
        self._before = 0  # of these, in the files before this one

    def take(self, number: int, count: int) -> int:
        """Keep the files whose middle lies in part `number` of `count`; return their bytes."""
        ends, total = accumulate(file.size for file in self.files), max(self.n_bytes, 1)
        self.files = [
            file
            for file, end in zip(self.files, ends, strict=True)
            if min((2 * end - file.size) * count // (2 * total), count - 1) == number - 1
        ]
        self.n_bytes = sum(file.size for file in self.files)
        return self.n_bytes

    def _problem(self, reason: str, where: str) -> None:
        if self.strict:
            raise DataError(f"{where}: {reason.split(' (')[0]}, and --strict was asked for")
        self.problems[reason] += 1

    def documents(self) -> Iterator[Document]:
        """All documents in order, empty ones left out."""
        self.problems.clear()
        self.done_bytes = self._before = 0
        for file in self.files:
            read = {".parquet": self._rows, ".jsonl": self._lines}.get(file.kind()[0], self._plain)
            with self._reading(file):
                yield from read(file)
            self.done_bytes = self._before = self._before + file.size

    @contextmanager
    def _reading(self, file: File) -> Iterator[None]:
        """Name the file in errors of reading it, also where a document is read later."""
        try:
            yield
        except (OSError, EOFError, zlib.error) as error:
            cut_off = isinstance(error, EOFError) or "Truncated compressed" in str(error)
            why = "it is cut off: its compressed data has no end; get it anew" if cut_off else error
            raise DataError(f"{file}: cannot be read ({why})") from error

    def _plain(self, file: File) -> Iterator[Document]:
        told: list[int] = []

        def pieces() -> Iterator[str]:
            with self._reading(file):
                yield from _pieces(self._decoded(file, told))

        if next(pieces(), None) is None:
            self._problem(EMPTY, str(file))
        else:
            yield Document(str(file), pieces)

    def _decoded(self, file: File, told: list[int]) -> Iterator[str]:
        """A file's text, block by block; what is not UTF-8 becomes U+FFFD.

        `told` keeps the line of the first, which counts once, however often the text is read.
        """
        decoder, line, block = codecs.getincrementaldecoder("utf-8-sig")(), 1, b"-"
        with file.open() as raw:
            unpacked = _decompressed(raw, file)
            while block:
                block, state = unpacked.read(PIECE_CHARS), decoder.getstate()
                try:
                    text = decoder.decode(block, not block)
                except UnicodeDecodeError as error:
                    if not told:
                        told.append(line + error.object[: error.start].count(b"\n"))
                        self._problem(INVALID_UTF8, f"{file}:{told[0]}")
                    decoder.errors = "replace"
                    decoder.setstate(state)
                    text = decoder.decode(block, not block)
                line += text.count("\n")
                yield text
                self.done_bytes = self._before + raw.tell()

    def _lines(self, file: File) -> Iterator[Document]:
        with file.open() as raw:
            for number, line in enumerate(_decompressed(raw, file), 1):
                self.done_bytes = self._before + raw.tell()
                where = f"{file}:{number}"
                if not line.strip():
                    continue
                try:
                    content = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    self._problem(INVALID_UTF8, where)
                    content = line.decode(errors="replace")
                if (record := json_object(content)) is None:
                    self._problem(NOT_JSON, where)
                else:
                    yield from self._record(record.get(self.field), where)

    def _rows(self, file: File) -> Iterator[Document]:
        parquet = _package("pyarrow.parquet", file)
        try:
            table = parquet.ParquetFile(file.path if isinstance(file.path, Path) else file.open())
            if self.field not in (names := table.schema_arrow.names):
                remedy = f"name one: --text-field {', '.join(names)}"
                raise DataError(f"{file}: no column {self.field!r}; {remedy}")
            batches = table.iter_batches(batch_size=256, columns=[self.field])
            values = (value for batch in batches for value in batch.column(0).to_pylist())
            for number, value in enumerate(values, 1):
                yield from self._record(value, f"{file}: row {number}")
        except _package("pyarrow", file).ArrowException as error:
            raise DataError(f"{file}: cannot be read as Parquet ({error})") from error

    def _record(self, text: object, where: str) -> Iterator[Document]:
        if not isinstance(text, str):
            self._problem(f"records without a text in {self.field!r} (left out)", where)
            return
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write
            self._problem(INVALID_UTF8, where)
            text = re.sub("[\ud800-\udfff]", "\ufffd", text)
        if not text:
            self._problem(EMPTY, where)
            return
        yield Document(where, partial(_pieces, [text]))


def _package(name: str, file: File) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"{file}: to read it run: pip install pyarrow") from error


def _decompressed(raw: IO[bytes], file: File) -> IO[bytes]:
    _, compression = file.kind()
    if not compression:
        return raw
    if not file.size:  # which would count as no text
        raise EOFError
    if compression == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    unpacked = _package("pyarrow", file).CompressedInputStream(raw, "zstd")
    return cast(IO[bytes], io.BufferedReader(unpacked, 1 << 20))


def _pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Joins and cuts a text into pieces of about `PIECE_CHARS`, between words where possible."""
    rest = ""
    for block in blocks:
        rest += block
        start = 0
        while len(rest) - start > 2 * PIECE_CHARS:
            low, end = start + PIECE_CHARS, start + 2 * PIECE_CHARS
            if cut := _CUT_LINE.search(rest, low, end) or _CUT_WORD.search(rest, low, end):
                end = cut.end()
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a document, and what to do with it."""

    text: str  # at most about half a million characters
    split: str
    last: bool  # of its document, in this split
    where: str  # its document's file, and line or row


def _measured(document: Document) -> tuple[int, int, float]:
    """Return a document's characters, bytes, and place in [0, 1) by its content alone."""
    digest, n_chars, n_bytes = hashlib.sha256(), 0, 0
    for text in document.pieces():
        content = text.encode()
        digest.update(content)
        n_chars, n_bytes = n_chars + len(text), n_bytes + len(content)
    return n_chars, n_bytes, int.from_bytes(digest.digest()[:4]) / 2**32


class Splitter:
    """Assigns documents to train and val, in the same way in each pass.

    Documents go to validation by a hash of their text: one stays where it is when others come, and
    no text is in both splits. A text of one document is cut by position instead.

    Where no fraction is named and the text is small, the hash decides as well, but so that at least
    `VAL_BYTES` are held out and less than twice as many: documents that are themselves larger are
    left to training. Where the others do not suffice, the large ones are cut by position.
    """

    def __init__(self, source: Source, val_fraction: float | None) -> None:
        self.source = source
        first_two = len(list(islice(source.documents(), 2)))
        if not first_two:
            reasons = "; ".join(f"{n} {reason}" for reason, n in source.problems.items())
            raise DataError(f"there is no text in the input ({reasons or 'no documents'})")
        self.val_fraction = self.threshold = VAL_FRACTION if val_fraction is None else val_fraction
        self.held_out_smallest = False  # where no document falls below the fraction
        # Documents of more bytes are not held out whole, but cut if `_cuts_large`.
        self._limit, self._cuts_large = 0 if first_two == 1 else math.inf, True
        # A small text is read to its end. The search for a document below the fraction takes
        # 1 / val_fraction documents as a rule.
        small, searches = val_fraction is None, bool(self._limit and self.val_fraction)
        total, smallest, sizes, shares = 0, 1.0, array("q"), array("d")
        for document in source.documents() if small or searches else ():
            _, size, share = _measured(document)
            total, smallest = total + size, min(smallest, share)
            if small := small and total < SMALL_BYTES:
                sizes.append(size)
                shares.append(share)
            elif smallest < self.val_fraction:
                break
        if small:
            self._fit(np.array(sizes), np.array(shares))
        elif searches and smallest >= self.val_fraction:
            self.threshold, self.held_out_smallest = smallest + 2**-33, True

    def _fit(self, sizes: NDArray[np.int64], shares: NDArray[np.float64]) -> None:
        """Choose what is held out of a small text."""
        total = int(sizes.sum())
        self.val_fraction = min(max(VAL_BYTES / total, VAL_FRACTION), MAX_VAL_FRACTION)
        wanted = self.val_fraction * total
        self._limit = min(self._limit, wanted)
        bins = (shares * _BINS).astype(np.int64)
        held = np.cumsum(np.bincount(bins, sizes * (sizes <= wanted), _BINS))
        n_bins = 1 + int(np.searchsorted(held, wanted)) if held[-1] >= wanted else 0
        self.threshold, self._cuts_large = n_bins / _BINS, n_bins == 0

    def pieces(self) -> Iterator[Piece]:
        """Every piece of every document, in order."""
        for document in self.source.documents():
            border, at = self._border(document), 0
            text = split = ""
            for block in document.pieces():
                inside = int(min(max(border - at, 0), len(block)))
                if 0 < inside < len(block):  # the cut: after a line's end if one is near
                    line = block.rfind("\n", 0, inside) + 1
                    inside = line if inside - line < 1000 and (line or at) else inside
                at += len(block)
                for name, part in (("train", block[:inside]), ("val", block[inside:])):
                    if part:
                        if text:
                            yield Piece(text, split, split != name, document.where)
                        text, split = part, name
            yield Piece(text, split, True, document.where)

    def _border(self, document: Document) -> float:
        """How many characters of a document are for training; infinite: all."""
        if not self.val_fraction:
            return math.inf
        n_chars, size, share = _measured(document)
        if size > self._limit:
            held_out = max(int(n_chars * self.val_fraction), 1)
            return n_chars - held_out if self._cuts_large else math.inf
        return 0 if share < self.threshold else math.inf
