"""Which split a document belongs to, and its pieces in the order in which they are written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from fasttrain.data.files import DataError
from fasttrain.data.sources import Document, Source

__all__ = ["Piece", "Splitter"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a document, and what to do with it.

    Attributes:
        text: At most about half a million characters.
        split: "train" or "val".
        last: Of its document, in this split.
        where: Its document's file, and line or row.
    """

    text: str
    split: str
    last: bool
    where: str


def _share(document: Document) -> float:
    """The document's place in [0, 1), by its content alone."""
    return int(document.sha256()[:8], 16) / 2**32


class Splitter:
    """Assigns documents to train and val, anew in the same way for each pass.

    Documents go to validation by a hash of their text: one stays where it is when others come, and
    no text is in both splits. A text of one document is cut by position instead.

    Args:
        source: The documents.
        val_fraction: Of the documents (of one document: of its text), in [0, 1).

    Attributes:
        single: There is only one document.
        held_out_smallest: No document fell below the fraction, and the nearest to it is held out.

    Raises:
        DataError: There is no text.
    """

    def __init__(self, source: Source, val_fraction: float) -> None:
        self.source, self.val_fraction = source, val_fraction
        first_two = len(list(islice(source.documents(), 2)))
        if not first_two:
            reasons = "; ".join(f"{n} {reason}" for reason, n in source.problems.items())
            raise DataError(f"there is no text in the input ({reasons or 'no documents'})")
        self.single = first_two == 1
        self.threshold, self.held_out_smallest = val_fraction, False
        if val_fraction and not self.single:
            # Ends at the first that is below, after 1 / val_fraction documents as a rule.
            smallest = 1.0
            for document in source.documents():
                smallest = min(smallest, _share(document))
                if smallest < val_fraction:
                    break
            if smallest >= val_fraction:
                self.threshold, self.held_out_smallest = smallest + 2**-33, True

    def pieces(self) -> Iterator[Piece]:
        """Every piece of every document, in order."""
        for document in self.source.documents():
            split, text = "", ""
            for next_split, next_text in self._parts(document):
                if split:
                    yield Piece(text, split, split != next_split, document.where)
                split, text = next_split, next_text
            if split:
                yield Piece(text, split, True, document.where)

    def _parts(self, document: Document) -> Iterator[tuple[str, str]]:
        """Split and text of each piece of a document."""
        if not self.single or not self.val_fraction:
            held_out = self.threshold and _share(document) < self.threshold
            for text in document.pieces():
                yield "val" if held_out else "train", text
            return
        total = sum(len(text) for text in document.pieces())
        border = total - max(int(total * self.val_fraction), 1)
        at = 0
        for text in document.pieces():
            inside = min(max(border - at, 0), len(text))
            if 0 < inside < len(text):  # the cut: after a line's end if one is near
                line = text.rfind("\n", 0, inside) + 1
                inside = line if inside - line < 1000 and (line or at) else inside
            at += len(text)
            if inside:
                yield "train", text[:inside]
            if inside < len(text):
                yield "val", text[inside:]
