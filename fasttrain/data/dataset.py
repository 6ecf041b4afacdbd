"""A split of a dataset: its shards as one long array of tokens, and where its documents end.

A shard has little-endian token ids behind a 1,024-byte llm.c header, or bare ones (nanoGPT). The
header is 256 int32: magic, version, token count, then zeros. Magic 20240520 with version 1 is
uint16, magic 20240801 with version 7 is uint32; llm.c and modded-nanogpt read and write the same.
Files are read with `preadv`, never mapped: SIGBUS ends a process whose mapped file shrinks.
"""

import errno
import hashlib
import json
import os
import stat
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from fasttrain.storage import DataError, write_atomically

Array = NDArray[np.int64]

HEADER_BYTES = 1024
KINDS: dict[int, tuple[int, np.dtype[Any]]] = {  # magic: (version, dtype)
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
}
BLOCK_TOKENS = 4 << 20  # read at once of a whole file: Python's share of the time is nothing
FEW_VAL_TOKENS = 5_000  # the loss of a smaller validation split says little
MAX_SHARD_TOKENS = 2**31 - 1  # the header's count is an int32


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The smallest dtype a shard can have for ids below `vocab_size`."""
    if not 0 < vocab_size <= 2**32:
        raise DataError(f"vocab_size must be from 1 to 2**32, got {vocab_size}")
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


class ShardInfo(TypedDict):
    """What `dataset.json` says of a shard."""

    file: str
    tokens: int
    sha256: str
    documents: int
    ends_file: str
    ends_sha256: str


class Shard:
    """A shard file, read only; open while it is read, a copy as long as this object lives.

    `dtype` is for files without header, `said` for what `dataset.json` lists, `name` for copies.
    """

    sha256: str  # of the file, header included, as hex; known when it has been scanned
    max_token: int  # −1 without tokens; known when it has been scanned
    ends_path: Path  # the file of document ends; known if `said` is given
    _fd: int | None = None

    def __init__(
        self, path: Path, *, dtype: str | None = None, said: ShardInfo | None = None, name: str = ""
    ) -> None:
        self.path, self.said, self.name = path, said, name or str(path)
        if said is not None:
            self.ends_path = path.parent / said["ends_file"]
        try:
            if name:  # a copy may be evicted while it is read; what has it open reads on
                self._fd = _open(path)
                weakref.finalize(self, os.close, self._fd).atexit = False
            with self._opened() as fd:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode):
                    raise DataError(f"{path}: not a file; put the shard itself there")
                self.identity, self._ctime_ns = _identity(found), found.st_ctime_ns
                raw = os.pread(fd, HEADER_BYTES, 0)
        except OSError as error:
            limit = ""
            if error.errno == errno.EMFILE:
                limit = f"; this process may open {_most_open()} files, raise that with ulimit -n"
            raise DataError(f"{path}: cannot be opened ({error.strerror}{limit})") from error
        self.dtype, self.offset_bytes, self.n_tokens = self._parse_header(
            raw.ljust(HEADER_BYTES, b"\0"), dtype, found.st_size
        )

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """Open the file in this block: a dataset may have more shards than a process has files."""
        if self._fd is not None:
            yield self._fd
            return
        fd = _open(self.path)
        try:
            yield fd
        finally:
            os.close(fd)

    def _parse_header(
        self, raw: bytes, dtype: str | None, size: int
    ) -> tuple[np.dtype[Any], int, int]:
        header = np.frombuffer(raw, "<i4")
        magic, version, count = header[:3].tolist()
        bare = None if dtype is None else np.dtype(dtype).newbyteorder("<")
        current, kind = KINDS.get(magic, (version, bare))
        if kind is None:
            raise DataError(
                f"{self.path}: not a token shard: its first number is {magic}, expected "
                f"{' or '.join(map(str, KINDS))}; for a headerless .bin name the type of its "
                'tokens: data.dtype = "uint16" or "uint32"'
            )
        if version != current:
            problem = f"version {version} of format {magic}, expected {current}"
            raise DataError(f"{self.path}: {problem}; write the shard again with a current tool")
        if bare not in (None, kind):
            problem = f"its header says {kind.name}, data.dtype says {dtype}"
            remedy = "remove data.dtype, it is for files without header"
            raise DataError(f"{self.path}: {problem}; {remedy}")
        offset, count = (HEADER_BYTES, count) if magic in KINDS else (0, size // kind.itemsize)
        expected = offset + count * kind.itemsize
        if count < 0 or size != expected or (offset and header[3:].any()):
            problem = f"{count} tokens of {kind.name} are {expected} bytes, and the file has {size}"
            remedy = "prepare or download it again"
            raise DataError(f"{self.path}: damaged, or data.dtype is wrong: {problem}; {remedy}")
        return kind, offset, count

    def read(self, pieces: Iterable[tuple[int, memoryview]]) -> None:
        """Fill each buffer with the tokens from its position on; refuse a file that changed.

        One `fstat` tells, cheap enough for every batch; what was range-checked stays what is read.
        """
        whole = True
        try:
            with self._opened() as fd:
                for start, piece in pieces:
                    at = self.offset_bytes + start * self.dtype.itemsize
                    while piece and (n := os.preadv(fd, (piece,), at)):
                        piece, at = piece[n:], at + n
                    whole = whole and not piece
                if whole and _identity(os.fstat(fd)) == self.identity:
                    return
        except FileNotFoundError:
            pass
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from error
        remedy = "restore the file and resume from the last checkpoint"
        raise DataError(f"{self.path}: truncated, replaced or removed while it was read; {remedy}")

    def document_ends(self) -> Array:
        """Return where the documents in it end, ascending offsets into its tokens."""
        said, path = self.said, self.ends_path
        assert said is not None
        try:
            found = path.stat()
            fits = stat.S_ISREG(found.st_mode) and found.st_size == 8 * said["documents"]
            raw = path.read_bytes() if fits else b""
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        ends = np.frombuffer(raw, "<u8")
        sound = fits and hashlib.sha256(raw).hexdigest() == said["ends_sha256"]
        if not sound or (ends[1:] < ends[:-1]).any() or (ends > self.n_tokens).any():
            problem = f"not the document ends of {self.name}: damaged or replaced"
            raise DataError(f"{path}: {problem}; restore the file or prepare the text again")
        return ends.astype(np.int64)

    def verify(self, cache: Path, vocab_size: int | None) -> None:
        """Refuse what is not as `dataset.json` says, or has a token beyond the vocabulary."""
        self.scan(cache)
        if (said := self.said) and vocab_size is not None:
            expected = (said["sha256"], said["tokens"], dtype_for(vocab_size))
            if (self.sha256, self.n_tokens, self.dtype) != expected:
                raise DataError(
                    f"{self.name}: its SHA-256 is {self.sha256[:16]}…, dataset.json says "
                    f"{said['sha256'][:16]}… and {said['tokens']} tokens of {expected[2].name}: "
                    "damaged or replaced; restore it or prepare the text again"
                )
        if vocab_size is not None and (token := self.max_token) >= vocab_size:
            at_byte = self.offset_bytes + self._max_at * self.dtype.itemsize
            whose = "of its dataset.json" if said else 'set by "model.vocab_size"'
            raise DataError(
                f"{self.name}: token {token} at offset {self._max_at} (byte {at_byte}) is outside "
                f"the vocabulary of {vocab_size} {whose}; it must be at least {token + 1}"
            )

    def scan(self, cache: Path) -> None:
        """Find hash and largest token of the whole file, from `cache` if the file is unchanged.

        An entry is void once the file's device, inode, size or one of its times has changed.
        """
        identity = [*self.identity, self._ctime_ns, self.dtype.str]
        entry = cache / f"{hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()}.json"
        # No entry, or one that cannot be used, costs a scan.
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(entry.read_text())
            if kept["identity"] == identity:
                self.sha256, self.max_token = str(kept["sha256"]), int(kept["max_token"])
                self._max_at = int(kept["max_at"])
                return
        with self._opened() as fd:
            digest = hashlib.sha256(os.pread(fd, self.offset_bytes, 0))
        self.max_token, self._max_at = -1, 0
        buffer = np.empty(BLOCK_TOKENS, self.dtype)
        for start in range(0, self.n_tokens, len(buffer)):
            block = buffer[: self.n_tokens - start]
            self.read([(start, block.data.cast("B"))])
            digest.update(block.data)
            if (largest := int(block.max())) > self.max_token:
                self.max_token, self._max_at = largest, start + int(block.argmax())
        self.sha256 = digest.hexdigest()
        found = {"sha256": self.sha256, "max_token": self.max_token, "max_at": self._max_at}
        with suppress(OSError):  # a cache that cannot be written costs the next start one scan
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(entry, json.dumps({"identity": identity, **found}).encode())


def _open(path: Path) -> int:
    # A pipe is opened at once, so that it can be refused.
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def _most_open() -> int:
    import resource  # Windows has none

    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _identity(found: os.stat_result) -> list[int]:
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]


@dataclass(eq=False, repr=False, kw_only=True)
class TokenDataset:
    """One split of a dataset: its shards as one long array of tokens, read from disk on demand."""

    shards: Sequence[Shard]
    vocab_size: int | None  # every id is below it; None: neither dataset nor caller say
    n_bytes: int | None = None  # UTF-8 bytes of the text; None: not recorded
    n_documents: int | None = None
    end_of_text: int | None = None  # the id that ends each document
    tokenizer_path: Path | None = None  # None for imports
    tokenizer_sha256: str | None = None
    joined: Sequence["TokenDataset"] = ()  # the datasets that this one consists of, in order

    def __post_init__(self) -> None:
        self.dtype: np.dtype[Any] = self.shards[0].dtype
        self._starts = np.cumsum([0, *(shard.n_tokens for shard in self.shards)], dtype=np.int64)
        self.n_tokens = int(self._starts[-1])
        self.max_token = max(shard.max_token for shard in self.shards)
        self.reading: Path | None = None  # the file that is being read at this moment
        # What identifies it.
        self.facts: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
            "dtype": self.dtype.str,
            "tokenizer": self.tokenizer_sha256,
            "shards": [shard.sha256 for shard in self.shards],
        }

    def read(self, start: int, count: int) -> NDArray[Any]:
        """Return tokens [start, start + count), across shards, in a new array."""
        out = np.empty(count, self.dtype)
        self.read_windows(np.array([start]), out.reshape(1, count), np.array([count]))
        return out

    @cached_property
    def document_ends(self) -> Array:
        """Ascending offsets, each just after a document's last token; the last one is `n_tokens`.

        From the files beside the shards, which are checked; without these by the end-of-text token,
        for which the split is read once. A split that begins with that token, as those of llm.c and
        modded-nanogpt do, has it in front of each document, others behind.
        """
        if self.joined:
            bases = np.cumsum([0, *(part.n_tokens for part in self.joined)])
            found = [p.document_ends + base for p, base in zip(self.joined, bases, strict=False)]
        elif self.shards[0].said is not None:
            shards = zip(self.shards, self._starts, strict=False)
            found = [shard.document_ends() + base for shard, base in shards]
        elif self.end_of_text is None:
            raise DataError(
                f"{self.shards[0].path.parent}: nothing says where its documents end; name the "
                "token that separates them, as in data.end_of_text = 50256, or prepare the text "
                "with python -m fasttrain.prepare"
            )
        else:
            found, in_front = [], int(self.read(0, 1)[0]) == self.end_of_text
            for start in range(0, self.n_tokens, BLOCK_TOKENS):
                block = self.read(start, min(BLOCK_TOKENS, self.n_tokens - start))
                at = np.flatnonzero(block == self.end_of_text) + start
                found.append(at if in_front else at + 1)
        ends = np.concatenate([*found, [self.n_tokens]])
        return np.unique(ends[ends > 0])

    def read_windows(self, begins: Array, out: NDArray[Any], counts: Array) -> None:
        """Read one window per row of `out`, (rows, length), C-contiguous, of `self.dtype`.

        A window has `counts` tokens, at most `length`; what is right of these in a row is left as
        it is. Shard after shard is read, each once.
        """
        assert out.dtype == self.dtype
        if not out.size:
            return
        length, size, raw = out.shape[1], self.dtype.itemsize, out.data.cast("B")
        ends = begins + counts
        low, high = int(begins.min()), int(ends.max())
        if low < 0 or high > self.n_tokens:
            raise DataError(f"tokens {low} to {high} were asked for; the split has {self.n_tokens}")
        numbers = np.searchsorted(self._starts, begins, side="right") - 1
        borders = self._starts.tolist()
        pieces = defaultdict(list)  # by shard: where in it a piece begins, and its bytes of `raw`
        windows = zip(numbers.tolist(), begins.tolist(), ends.tolist(), strict=True)
        for row, (number, begin, end) in enumerate(windows):
            at = row * length * size
            while begin < end:  # once for each shard that the window runs on into
                stop = min(end, borders[number + 1])
                until = at + (stop - begin) * size
                pieces[number].append((begin - borders[number], raw[at:until]))
                number, begin, at = number + 1, stop, until
        for number in sorted(pieces):
            self.reading = self.shards[number].path
            self.shards[number].read(pieces[number])
        self.reading = None

    def shards_of(self, begins: Array, ends: Array) -> list[Shard]:
        """Return the shards that hold the first and the last token of windows, in order."""
        tokens = np.concatenate([begins, ends - 1])
        numbers = np.unique(np.searchsorted(self._starts, tokens, side="right") - 1)
        return [self.shards[number] for number in numbers.tolist()]


def join(datasets: Sequence[TokenDataset]) -> TokenDataset:
    """Return several datasets, one behind the other, as one."""
    first, *others = datasets
    for other in others:
        for what in ("tokenizer", "vocab_size", "end_of_text", "dtype"):
            one, two = first.facts[what], other.facts[what]
            if one != two:
                both = f"{first.shards[0].path.parent} and {other.shards[0].path.parent}"
                problem = f"{both} differ in {what} ({str(one)[:16]}, {str(two)[:16]})"
                remedy = "prepare them with one tokenizer: --tokenizer FIRST/tokenizer.json"
                raise DataError(f"data.paths: {problem}; {remedy}")
    shards = [shard for dataset in datasets for shard in dataset.shards]
    totals: dict[str, Any] = {}
    for name in ("n_bytes", "n_documents"):
        values = [getattr(dataset, name) for dataset in datasets]
        totals[name] = None if None in values else sum(values)
    return replace(first, shards=shards, joined=datasets, **totals)
