"""A split of a dataset: its shards as one long array of tokens, and where its documents end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fasttrain.data.files import DataError
from fasttrain.data.shards import Shard

SCAN_TOKENS = 4 << 20  # of a block read for its end-of-text tokens


@dataclass(eq=False, repr=False)
class TokenDataset:
    """One split of a dataset: its shards as one long array of tokens, read from disk on demand."""

    shards: Sequence[Shard]
    _: KW_ONLY
    vocab_size: int | None  # every id is below it; None: neither dataset nor caller say
    n_bytes: int | None = None  # UTF-8 bytes of the text; None: not recorded
    n_documents: int | None = None
    end_of_text: int | None = None  # the id that ends each document
    tokenizer_path: Path | None = None  # None for imports
    tokenizer_sha256: str | None = None
    joined: Sequence[TokenDataset] = ()  # the datasets that this one consists of, in order

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
        self.read_windows([start], out.reshape(1, count))
        return out

    @cached_property
    def document_ends(self) -> NDArray[np.int64]:
        """Ascending offsets, each just after a document's last token; the last one is `n_tokens`.

        From the files beside the shards, which are checked; without these by the end-of-text token,
        for which the split is read once. A split that begins with that token, as those of llm.c and
        modded-nanogpt do, has it in front of each document, others behind.
        """
        if self.joined:
            bases = np.cumsum([0, *(part.n_tokens for part in self.joined)])
            return np.concatenate(
                [p.document_ends + base for p, base in zip(self.joined, bases, strict=False)]
            )
        found: list[NDArray[np.int64]] = []
        if self.shards[0].ends is not None:
            for shard, base in zip(self.shards, self._starts, strict=False):
                found.append(shard.document_ends() + base)
        elif self.end_of_text is None:
            raise DataError(
                f"{self.shards[0].path.parent}: nothing says where its documents end; name the "
                "token that separates them, as in data.end_of_text = 50256, or prepare the text "
                "with python -m fasttrain.prepare"
            )
        else:
            in_front = int(self.read(0, 1)[0]) == self.end_of_text
            for start in range(0, self.n_tokens, SCAN_TOKENS):
                block = self.read(start, min(SCAN_TOKENS, self.n_tokens - start))
                at = np.flatnonzero(block == self.end_of_text) + start
                found.append(at if in_front else at + 1)
        ends = np.concatenate([*found, [self.n_tokens]])
        return np.unique(ends[ends > 0])

    def read_windows(
        self,
        starts: Sequence[int] | NDArray[np.int64],
        out: NDArray[Any],
        counts: NDArray[np.int64] | None = None,
    ) -> None:
        """Read one window per row of `out`, (rows, length), C-contiguous, of `self.dtype`.

        A window has `counts` tokens, at most `length` (None: all of them); what is right of these
        in a row is left as it is. Shard after shard is read, each once.
        """
        assert out.dtype == self.dtype
        if not out.size:
            return
        length, size, raw = out.shape[1], self.dtype.itemsize, out.data.cast("B")
        begins = np.asarray(starts, np.int64)
        ends = begins + (length if counts is None else counts)
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
            shard = self.shards[number]
            self.reading = shard.path
            for begin, piece in pieces[number]:
                shard.read_into(piece, begin)
            shard.check_unchanged()
        self.reading = None

    def shards_of(self, begins: NDArray[np.int64], ends: NDArray[np.int64]) -> list[Shard]:
        """Return the shards that hold the first and the last token of windows, in order."""
        tokens = np.concatenate([begins, ends - 1])
        numbers = np.unique(np.searchsorted(self._starts, tokens, side="right") - 1)
        return [self.shards[number] for number in numbers.tolist()]


def join(datasets: Sequence[TokenDataset]) -> TokenDataset:
    """Return several datasets, one behind the other, as one."""
    first, *others = datasets
    for other in others:
        for what in ("tokenizer_sha256", "vocab_size", "end_of_text", "dtype"):
            one, two = getattr(first, what), getattr(other, what)
            if one != two:
                raise DataError(
                    f"data.paths: {first.shards[0].path.parent} and {other.shards[0].path.parent} "
                    f"differ in {what.removesuffix('_sha256')} ({str(one)[:16]}, {str(two)[:16]}); "
                    "prepare them with one tokenizer: --tokenizer FIRST/tokenizer.json"
                )

    def total(name: str) -> int | None:
        values = [getattr(dataset, name) for dataset in datasets]
        return None if None in values else sum(values)

    return replace(
        first,
        shards=[shard for dataset in datasets for shard in dataset.shards],
        n_bytes=total("n_bytes"),
        n_documents=total("n_documents"),
        joined=datasets,
    )
