"""Documents from the files of an input, and which of their pieces are for training.

A plain file is one document, or several with a separator; a record of JSON or a row of Parquet is
one. Nothing is held that grows with the input: a large file is read, decoded and given out in
pieces, again for each pass. What cannot be read as asked is counted under its reason, or, if
strict, ends the run with file and line. `Splitter` says which pieces are for training, and which
for validation.
"""

import hashlib
import io
import json
import math
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from fasttrain.config.keys import counted
from fasttrain.config.untrusted import json_object
from fasttrain.prepare import inputs
from fasttrain.prepare.inputs import (
    ARCHIVES,
    KNOWN,
    PLAIN,
    Content,
    Decoder,
    File,
    Transcoded,
    UnclearError,
    look,
    members,
    reading,
    unpacked,
)
from fasttrain.storage import DataError

PIECE_CHARS = 1 << 18  # of a document: small enough to share out, large enough to lose no time
CONTEXT_CHARS = 1024  # of the pieces beside one that its tokens may depend on
MAX_RECORD_BYTES = 256 << 20  # of a line, a record or a document that is held
# Where a text may be cut so that no word of a byte-level BPE spans the cut: after a line's end and
# before something that is not space; in a line too long for that, before a single space.
_CUT_LINE = re.compile(r"\n(?=\S)")
_CUT_WORD = re.compile(r"(?<=\S)(?= \S)")

# Held out where nobody says how much: 0.5 %, of a text that this is too little of 100 kB, which are
# some 25,000 tokens, but never more than a tenth.
VAL_FRACTION, VAL_BYTES, MAX_VAL_FRACTION = 0.005, 100_000, 0.1
SMALL_BYTES = 20_000_000  # from here on 0.5 % are 100 kB
_MEASURED_BYTES = 1_000_000_000  # of records, to find out whether a text is small
_BINS = 4096
# Of a larger text, no document gives more than this part of what is to be held out, or only its
# share. So that of a hundred thousand texts, one has twice as much held out as was asked for, or
# more: the chance that of what comes 20 times on average there are more than 40.
_LARGEST_PART = 1 / 20
_TAIL_BYTES = 1000  # of a document that is cut, at least, where as much may be held out

INVALID_UTF8 = "documents with invalid UTF-8 (the bytes replaced by U+FFFD)"
BAD_BYTES = "bytes that are not valid text (replaced by U+FFFD)"
EMPTY = "empty documents (left out)"
NOT_JSON = "lines that are not a JSON object (left out)"
NO_TEXT_FILES = "files in archives without a known ending or records (left out)"
# With which tokenizers and their users part documents.
SEPARATORS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|endofdoc|>",
    "</s>",
    "<eos>",
)
# All begin with one character, for which a compiled expression looks faster than a search for each.
_SEPARATORS = re.compile("|".join(map(re.escape, SEPARATORS)))


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it came from."""

    where: str  # file, and line or row
    pieces: Callable[[], Iterator[str]]  # its text from the start, in pieces as `_pieces` cuts it


class Source:
    """The documents of some files, as often as asked for; if `strict`, a problem is a DataError.

    `format`, `encoding` and `separator` are what the command's options are; "auto" and an empty
    separator: what the files themselves show.
    """

    def __init__(
        self,
        files: Sequence[File],
        *,
        field: str = "text",
        strict: bool = False,
        format: str = "auto",
        encoding: str = "auto",
        separator: str = "",
    ) -> None:
        self.field, self.strict = field, strict
        self.format, self.encoding, self.separator = format, encoding, separator
        # The end of a line may be that of Windows.
        self._ends = re.compile(re.escape(separator).replace("\\\n", "\r?\n"))
        self._has_separator = False  # in what this pass has read
        self.files = [
            replace(file, content=look(file, format=format, encoding=encoding))
            if file.content is None
            else file
            for file in files
        ]
        self.n_bytes = sum(file.size for file in files)
        self.problems: Counter[str] = Counter()  # of the pass now running or last run, by reason
        self.other_fields: dict[str, str] = {}  # of records without a text, with their types
        self.done_bytes = 0  # of `n_bytes`, read by this pass
        self.n_read = 0  # bytes of content that this pass has read, records and all
        self.n_documents = 0  # that this pass has given out
        self._fields: dict[str, str] = {}  # of the first record without a text in this file
        self._without_text: dict[str, str] = {}  # files of this pass, with their fields
        # Called with each line that a user should see before the end.
        self.note: Callable[[str], None] = lambda line: None
        self._is_binary: bool | None = None  # the column of the text in Parquet
        self._told: set[str] = set()  # of which they were told: separators, reasons to leave out
        self._before = 0  # of `n_bytes`, in the files before this one
        self._file: File | None = None  # being read

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

    def sample(self, text: str) -> None:
        """Look into a text for what separates documents elsewhere."""
        for separator in SEPARATORS if _SEPARATORS.search(text) else ():
            if n_times := text.count(separator):
                self.problems[f"{separator} in the text"] += n_times
                if separator not in self._told:
                    self._told.add(separator)
                    remedy = f"--separator '{separator}' ends a document there"
                    self.note(
                        f"The text holds {separator}, which is encoded as characters: {remedy}"
                    )

    def documents(self) -> Iterator[Document]:
        """All documents in order, empty ones left out."""
        self.problems.clear()
        self.done_bytes = self._before = self.n_read = self.n_documents = 0
        self._has_separator = False
        self._without_text.clear()
        for file in self.files:
            self._file = file
            with reading(file):
                yield from self._documents(file)
                file.check_unchanged()
            self.done_bytes = self._before = self._before + file.size
        self._judge("the input", self.problems[BAD_BYTES], self.n_read)
        self._tell_without_text()
        if self.separator and not self._has_separator and self.separator not in self._told:
            self._told.add(self.separator)
            self.note(f"--separator {self.separator!r} ends no document: the text does not hold it")

    def _tell_without_text(self) -> None:
        """Name the first file that gave nothing, unless none gave anything."""
        if not self._without_text or not self.n_documents or self.field in self._told:
            return
        self._told.add(self.field)
        name, fields = next(iter(self._without_text.items()))
        others = len(self._without_text) - 1
        also = f", nor in {counted(others, 'other file')}" * bool(others)
        self.note(f"No record has a text in {self.field!r} in {name} (it has {fields}){also}")

    def _judge(self, what: object, n_bad: int, n_bytes: int) -> None:
        """Refuse a text of another encoding, unless one was named."""
        if self.encoding == "auto" and inputs.is_bad(n_bad, n_bytes):
            remedy = "name its encoding: --encoding NAME (utf-8 replaces them by U+FFFD)"
            raise DataError(f"{what}: {inputs.bad_text(n_bad, n_bytes)}; {remedy}")

    def _documents(self, file: File) -> Iterator[Document]:
        content = file.content or PLAIN
        n_bad, n_before = self.problems[BAD_BYTES], self.n_read
        if content.format in ARCHIVES:
            yield from self._archived(file, content)
            return
        readers = {"jsonl": self._lines, "json": self._values, "parquet": self._rows}
        plain = self._parted if self.separator else self._plain
        n_documents, self._fields = self.n_documents, {}
        for document in readers.get(content.format, plain)(file, content):
            self.n_documents += 1
            yield document
        if self._fields and self.n_documents == n_documents:
            self._without_text[str(file)] = _in_words(self._fields)
        self._judge(file, self.problems[BAD_BYTES] - n_bad, self.n_read - n_before)

    def _archived(self, file: File, archive: Content) -> Iterator[Document]:
        for member in members(file, archive, partial(self._show, file), self._leave_out):
            with reading(member):
                is_known = member.endings()[0] in KNOWN
                try:
                    content = look(member, format=self.format, encoding=self.encoding)
                except UnclearError as error:
                    if is_known or error.reason is None:
                        raise
                    self.problems[NO_TEXT_FILES] += 1
                    continue
                if content.format in ARCHIVES:
                    raise DataError(f"{member}: an archive within an archive; unpack {file}")
                if content.format == "text" and not is_known and self.format == "auto":
                    self.problems[NO_TEXT_FILES] += 1
                    continue
                yield from self._documents(replace(member, content=content))

    def _leave_out(self, reason: str, name: str) -> None:
        """Count a file in an archive that is left out; tell the first for each reason."""
        self.problems[f"files in archives: {reason} (left out)"] += 1
        if reason not in self._told:
            self._told.add(reason)
            self.note(f"Left out {name}: {reason}")

    def _show(self, file: File, at: int) -> None:
        if file is self._file:  # not a part of it
            self.done_bytes = self._before + at

    def _plain(self, file: File, content: Content) -> Iterator[Document]:
        seen = _Seen()

        def pieces() -> Iterator[str]:
            with reading(file):
                yield from _pieces(self._decoded(file, content, seen))

        if next(pieces(), None) is None:
            self._problem(EMPTY, str(file))
        else:
            yield Document(str(file), pieces)

    def _parted(self, file: File, content: Content) -> Iterator[Document]:
        """The documents between separators in a plain text, each of which is held."""
        separator = self.separator
        rest, line = "", 1
        is_first = True
        for block in self._decoded(file, content, _Seen()):
            unseen = max(len(rest) - 2 * len(separator), 0)
            rest += block
            if self._ends.search(rest, unseen):
                self._has_separator = True
                *parts, rest = self._ends.split(rest)
                for part in parts:
                    yield from self._part(part, f"{file}:{line}", is_first)
                    line += part.count("\n") + separator.count("\n")
                    is_first = False
            if len(rest) > MAX_RECORD_BYTES:
                problem = f"more than {MAX_RECORD_BYTES >> 20} MiB without {separator!r}"
                raise DataError(f"{file}:{line}: {problem}; name another --separator, or none")
        yield from self._part(rest, f"{file}:{line}", is_first)

    def _part(self, text: str, where: str, is_first: bool) -> Iterator[Document]:
        """What stands before a separator; a line's end behind that is the separator's."""
        if not is_first:
            text = text[1 if text[:1] == "\n" else 2 if text[:2] == "\r\n" else 0 :]
        if text.strip():
            yield Document(where, partial(_pieces, [text]))

    def _decoded(self, file: File, content: Content, seen: "_Seen") -> Iterator[str]:
        """A file's text, block by block; what is not valid in its encoding becomes U+FFFD.

        What is `seen` in one reading is not counted again in the next.
        """
        decoder = Decoder(content.encoding)
        n_read = n_bad = n_blocks = 0
        block = b"-"
        with file.open() as raw:
            stream = unpacked(raw, content.packed, file)
            while block:
                block = stream.read(PIECE_CHARS)
                text, n_bad_here, n_lines = decoder.decode(block)
                n_read += len(block)
                self.n_read += max(n_read - seen.n_read, 0)
                seen.n_read = max(n_read, seen.n_read)
                if n_bad_here:
                    if not seen.n_bad:
                        n_lines += _lines_before(file, content, n_blocks)
                        self._problem(INVALID_UTF8, f"{file}:{1 + n_lines}")
                    n_bad += n_bad_here
                    self.problems[BAD_BYTES] += max(n_bad - seen.n_bad, 0)
                    seen.n_bad = max(n_bad, seen.n_bad)
                n_blocks += 1
                yield text
                self._show(file, raw.tell())

    def _utf8(self, raw: IO[bytes], file: File, content: Content) -> IO[bytes]:
        """The content of a file that is open, as UTF-8 whatever its encoding."""
        stream = unpacked(raw, content.packed, file)
        if content.encoding == "utf-8":
            return stream

        def count_bad(n_bad: int) -> None:
            self._problem(INVALID_UTF8, str(file))
            self.problems[BAD_BYTES] += n_bad

        transcoded: Any = Transcoded(stream, content.encoding, count_bad)
        return io.BufferedReader(transcoded, 1 << 20)

    def _lines(self, file: File, content: Content) -> Iterator[Document]:
        with file.open() as raw:
            stream = self._utf8(raw, file, content)
            lines = iter(partial(stream.readline, MAX_RECORD_BYTES + 1), b"")
            for number, line in enumerate(lines, 1):
                self._show(file, raw.tell())
                self.n_read += len(line)
                where = f"{file}:{number}"
                if len(line) > MAX_RECORD_BYTES:
                    raise _too_long(where, "line")
                if not line.strip():
                    continue
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    self._problem(INVALID_UTF8, where)
                    text, n_bad = Decoder("utf-8").decode_all(line)
                    self.problems[BAD_BYTES] += n_bad
                if (record := json_object(text)) is None:
                    self._problem(NOT_JSON, where)
                else:
                    yield from self._of_record(record, where)

    def _values(self, file: File, content: Content) -> Iterator[Document]:
        """The records of a JSON array, or of objects one after another on any number of lines."""
        parser = json.JSONDecoder()
        decoder = Decoder("utf-8")
        text, at, number = "", 0, 0
        in_array = ended = False
        with file.open() as raw:
            stream = self._utf8(raw, file, content)
            while True:
                at = cast(re.Match[str], _BETWEEN.match(text, at)).end()
                mark = text[at : at + 1]
                if (mark == "[" and not in_array) or (mark == "]" and in_array):
                    in_array = not in_array
                    at += 1
                    continue
                try:
                    value, at = parser.raw_decode(text, at)
                except (ValueError, RecursionError) as error:
                    if ended and not mark and not in_array:
                        return
                    where = f"{file}: record {number + 1}"
                    if ended or isinstance(error, RecursionError):
                        raise DataError(f"{where}: not valid JSON ({error})") from None
                    if len(text) - at > MAX_RECORD_BYTES:
                        raise _too_long(where, "record") from None
                    # Twice as much each time, so that a long record is not parsed often.
                    block = stream.read(max(1 << 20, len(text) - at))
                    ended = not block
                    more, n_bad, _ = decoder.decode(block)
                    if n_bad:
                        self._problem(INVALID_UTF8, where)
                        self.problems[BAD_BYTES] += n_bad
                    text, at = text[at:] + more, 0
                    self.n_read += len(block)
                    self._show(file, raw.tell())
                    continue
                number += 1
                where = f"{file}: record {number}"
                if isinstance(value, dict):
                    yield from self._of_record(value, where)
                else:
                    self._problem(NOT_JSON, where)

    def _rows(self, file: File, content: Content) -> Iterator[Document]:
        parquet = inputs.package("pyarrow.parquet", file)
        is_local = isinstance(file.path, Path) and file.opener is None
        try:
            table = parquet.ParquetFile(file.path if is_local else file.open())
            column, inner, is_binary = self._column(table.schema_arrow, file)
            if self._is_binary not in (None, is_binary) and self.encoding == "auto":
                problem = f"column {self.field!r} holds text in some files and binary in others"
                raise DataError(f"{file}: {problem}; --encoding utf-8 reads both as text")
            self._is_binary = is_binary
            n_rows = max(table.metadata.num_rows, 1)
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(column).to_pylist():
                    number += 1
                    for name in inner:
                        value = value and value[name]
                    yield from self._record(value, f"{file}: row {number}")
                n_read = file.size * number // n_rows
                self.n_read += n_read - file.size * (number - len(batch)) // n_rows
                self._show(file, n_read)
        except inputs.package("pyarrow", file).ArrowException as error:
            raise DataError(f"{file}: cannot be read as Parquet ({error})") from error

    def _column(self, schema: Any, file: File) -> tuple[str, list[str], bool]:
        """Return the column of the text, the fields below it, and if they hold binary text.

        What is no text is refused.
        """
        name, inner = self.field, list[str]()
        if name not in schema.names:
            name, *inner = self.field.split(".")
        is_text = _TEXT_COLUMN.match
        texts = [column.name for column in schema if is_text(str(column.type))]
        remedy = "it has no column of text"
        if texts:
            remedy = f"name one: --text-field {', '.join(texts)}"
        if name not in schema.names:
            raise DataError(f"{file}: no column {self.field!r}; {remedy}")
        if schema.names.count(name) > 1:
            raise DataError(f"{file}: has several columns {name!r}; rename all but one")
        kind = schema.field(name).type
        for step in inner:
            names = [part.name for part in kind] if str(kind).startswith("struct") else []
            if step not in names:
                raise DataError(f"{file}: no column {self.field!r}; {remedy}")
            kind = kind.field(step).type
        if not is_text(str(kind)):
            problem = f"column {self.field!r} holds {kind}, not text"
            if str(kind).startswith("struct"):
                remedy = f"name a field of it: --text-field {self.field}.{kind[0].name}"
            raise DataError(f"{file}: {problem}; {remedy}")
        return name, inner, "binary" in str(kind)

    def _of_record(self, record: dict[str, Any], where: str) -> Iterator[Document]:
        """The document of a JSON object; a dotted name goes into the objects in it."""
        value: Any = record.get(self.field)
        if value is None and "." in self.field:
            value = record
            for name in self.field.split("."):
                value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, str) and not self._fields:
            self._fields = _fields(record)
            self.other_fields = self.other_fields or self._fields
        yield from self._record(value, where)

    def _record(self, text: object, where: str) -> Iterator[Document]:
        if isinstance(text, bytes):
            named = self.encoding if self.encoding != "auto" else "utf-8"
            decoder = Decoder(named)
            text, n_bad = decoder.decode_all(text)
            if n_bad:
                self._problem(INVALID_UTF8, where)
                self.problems[BAD_BYTES] += n_bad
        if not isinstance(text, str):
            self._problem(f"records without a text in {self.field!r} (left out)", where)
            return
        if len(text) > MAX_RECORD_BYTES:
            raise _too_long(where, "record")
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write
            self._problem(INVALID_UTF8, where)
            text = re.sub("[\ud800-\udfff]", "\ufffd", text)
        if "\0" in text:  # which JSON and Parquet can write
            self._problem(INVALID_UTF8, where)
            self.problems[BAD_BYTES] += text.count("\0")
            text = text.replace("\0", "\ufffd")
        if not text:
            self._problem(EMPTY, where)
        elif self.separator and self._ends.search(text):
            self._has_separator = True
            for number, part in enumerate(self._ends.split(text)):
                yield from self._part(part, where, number == 0)
        else:
            yield Document(where, partial(_pieces, [text]))


@dataclass
class _Seen:
    """What of a file is counted in this pass."""

    n_read: int = 0
    n_bad: int = 0


_TEXT_COLUMN = re.compile(r"(dictionary<values=)?(large_|fixed_size_)?(string|binary)")
_BETWEEN = re.compile(r"[\s,]*")


def _lines_before(file: File, content: Content, n_blocks: int) -> int:
    """Return how many lines end in the first blocks of a file.

    They are read again, because counting the lines of each text would take a tenth of the time.
    """
    decoder = Decoder(content.encoding)
    with file.open() as raw:
        stream = unpacked(raw, content.packed, file)
        blocks = (decoder.decode(stream.read(PIECE_CHARS))[0] for _ in range(n_blocks))
        return sum(text.count("\n") for text in blocks)


def _too_long(where: str, what: str) -> DataError:
    problem = f"a {what} of more than {MAX_RECORD_BYTES >> 20} MiB"
    return DataError(f"{where}: {problem}; leave it out, or --format text reads it as one document")


def _fields(record: dict[str, Any]) -> dict[str, str]:
    """Return the fields of a record and of the objects in it, with the types that JSON has."""
    names = {str: "text", dict: "object", list: "list", bool: "truth value", type(None): "null"}
    fields = {}
    for name, value in record.items():
        inner = value if isinstance(value, dict) else {}
        below = {f"{name}.{key}": item for key, item in inner.items()}
        for path, item in (below or {name: value}).items():
            shown = path if path.isprintable() else repr(path)
            fields[shown[:60]] = names.get(type(item), "number")
    return dict(islice(fields.items(), 12))


def _in_words(fields: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in fields.items())


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
    before: str = ""  # the end of what comes before it in the same document and split
    after: str = ""  # the beginning of what follows


def _measured(document: Document) -> tuple[int, float]:
    """Return a document's bytes, and its place in [0, 1) by its content alone."""
    digest, n_bytes = hashlib.sha256(), 0
    for text in document.pieces():
        content = text.encode()
        digest.update(content)
        n_bytes += len(content)
    return n_bytes, int.from_bytes(digest.digest()[:4]) / 2**32


class Rule(NamedTuple):
    """What is held out of a document, by its size and hash alone."""

    fraction: float  # of all bytes, to be held out
    threshold: float  # of at most `limit` bytes, a document is held out whole if its hash is below
    limit: float
    tail: float  # of a larger one its end: its share, or so many bytes if that is more
    cut: float  # and only if hash · end / share is below

    def held_out(self, size: int, share: float) -> int:
        """Return how many bytes at the end of a document are held out."""
        if size <= self.limit:
            return size if share < self.threshold else 0
        tail = max(int(size * self.fraction), int(self.tail), 1)
        return tail if share * tail < self.cut * size * self.fraction else 0


class Splitter:
    """Assigns documents to train and val, in the same way in each pass.

    A document goes to validation by a hash of its text: it stays where it is when others come, and
    no text is in both splits. That holds out the share of bytes that is asked for, on average; from
    documents that are large beside what is to be held out, it is far off. Of these, only an end is
    held out: its own share, or in proportion more of fewer documents.

    A text of less than `SMALL_BYTES` is measured first, and what is held out is chosen so that it
    is not less than half, and not more than twice what was asked for, but at least a character.
    Where nobody says how much, it is at least `VAL_BYTES`, unless that is more than a tenth.
    """

    def __init__(self, source: Source, val_fraction: float | None) -> None:
        self.source = source
        self.val_fraction = VAL_FRACTION if val_fraction is None else val_fraction
        sizes, shares, is_whole = self._measure(whether=val_fraction != 0)
        if val_fraction == 0:
            self.rule = Rule(0.0, 0.0, math.inf, 0.0, 0.0)
        elif is_whole:
            self.rule = self._fitted(np.array(sizes), np.array(shares), val_fraction is None)
        else:
            n_bytes = float(source.n_bytes)
            if sizes:  # records hold more than text
                n_bytes = max(sum(sizes), n_bytes * sum(sizes) / max(source.n_read, 1))
            largest = self.val_fraction * n_bytes * _LARGEST_PART
            self.rule = Rule(self.val_fraction, self.val_fraction, largest, largest, 1.0)

    def _measure(self, *, whether: bool) -> tuple["array[int]", "array[float]", bool]:
        """Return sizes and hashes of the first documents, and whether these are all.

        Of plain files, the sizes are known; of others so many are measured as a small text has.
        """
        source = self.source
        sizes, shares = array("q"), array("d")
        plain = all(file.content == PLAIN for file in source.files)
        total = 0
        for document in source.documents():
            if not whether or (plain and source.n_bytes >= SMALL_BYTES):
                return sizes, shares, False
            size, share = _measured(document)
            sizes.append(size)
            shares.append(share)
            total += size
            if total >= SMALL_BYTES or source.n_read >= _MEASURED_BYTES:
                return sizes, shares, False
        if not sizes:
            reasons = "; ".join(f"{n} {reason}" for reason, n in source.problems.items())
            fields = source.other_fields
            texts = [name for name, kind in fields.items() if kind == "text"]
            remedy = f": the first record has {_in_words(fields)}"
            remedy += f"; name its text: --text-field {texts[0] if texts else 'NAME'}"
            problem = f"there is no text in the input ({reasons or 'no documents'})"
            raise DataError(problem + remedy * bool(fields))
        return sizes, shares, True

    def _fitted(
        self, sizes: NDArray[np.int64], shares: NDArray[np.float64], is_default: bool
    ) -> Rule:
        """Return what to hold out of a small text."""
        total = int(sizes.sum())
        if is_default:
            self.val_fraction = min(max(VAL_BYTES / total, VAL_FRACTION), MAX_VAL_FRACTION)
        fraction = self.val_fraction
        wanted = fraction * total
        rules = []
        if not is_default and len(sizes) > 1:  # as for a large text of small documents
            rules.append(Rule(fraction, fraction, math.inf, 0.0, 0.0))
        # Whole documents, none larger than all that is wanted, as many as it takes.
        bins = (shares * _BINS).astype(np.int64)
        held = np.cumsum(np.bincount(bins, sizes * (sizes <= wanted), _BINS))
        if held[-1] >= wanted:
            n_bins = 1 + int(np.searchsorted(held, wanted))
            rules.append(Rule(fraction, n_bins / _BINS, wanted, 0.0, 0.0))
        # The ends of larger documents, of as many as it takes.
        tail = min(wanted, _TAIL_BYTES)
        tails = np.maximum(np.maximum(np.trunc(fraction * sizes), np.trunc(tail)), 1)
        keys = np.where(sizes > wanted, shares * tails / (fraction * sizes), np.inf)
        order = np.argsort(keys, kind="stable")
        middles = np.cumsum(tails[order]) - tails[order] / 2
        n_cut = max(1, int(np.searchsorted(middles, wanted, "right")))
        cut = float(keys[order[n_cut]]) if n_cut < len(keys) else math.inf
        rules.append(Rule(fraction, 0.0, wanted, tail, cut))
        # The end of each, as where all documents are the same.
        rules.append(Rule(fraction, 0.0, 0.0, 0.0, math.inf))
        nearest, distance = rules[-1], math.inf
        for rule in rules:
            n_bytes = sum(map(rule.held_out, sizes.tolist(), shares.tolist()))
            if wanted / 2 <= n_bytes <= 2 * wanted and n_bytes < total:
                return rule
            if 0 < n_bytes < total and abs(n_bytes - wanted) < distance:
                nearest, distance = rule, abs(n_bytes - wanted)
        return nearest

    def pieces(self) -> Iterator[Piece]:
        """Every piece of every document, in order."""
        for document in self.source.documents():
            size, held_out = self._held_out(document)
            border, at = size - held_out, 0
            text = split = before = ""
            for block in document.pieces():
                inside = len(block) if not held_out else 0
                if 0 < held_out < size and at < border:
                    end = at + size_of(block)
                    fits = end <= border
                    inside = len(block) if fits else _inside(block, border - at, held_out, at > 0)
                    at = end
                for name, part in (("train", block[:inside]), ("val", block[inside:])):
                    if part and text:
                        self.source.sample(text)
                        after = part[:CONTEXT_CHARS] if split == name else ""
                        yield Piece(text, split, split != name, document.where, before, after)
                        before = text[-CONTEXT_CHARS:] if split == name else ""
                    if part:
                        text, split = part, name
            self.source.sample(text)
            yield Piece(text, split, True, document.where, before)

    def _held_out(self, document: Document) -> tuple[int, int]:
        """Return a document's bytes, and how many at its end are for validation."""
        if not self.val_fraction:
            return 0, 0
        size, share = _measured(document)
        return size, min(self.rule.held_out(size, share), size)


def size_of(text: str) -> int:
    """Return the bytes of a text in UTF-8, without making a copy of most."""
    return len(text) if text.isascii() else len(text.encode())


def _inside(text: str, room: int, held_out: int, is_later: bool) -> int:
    """Return how many characters of a document's piece are for training.

    Of its bytes `room` are, but for what follows the last line's end if one is near.
    """
    content = text.encode()
    line = content.rfind(b"\n", 0, room) + 1
    near = room - line < min(1000, held_out // 4) and (line or is_later)
    return len(content[: line if near else room].decode(errors="ignore"))
