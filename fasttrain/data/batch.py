"""What a micro-batch is.

Legend: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["IGNORE", "Batch", "pad", "to_batch"]

IGNORE = -100  # the target of a position that the loss leaves out


@dataclass(frozen=True, slots=True)
class Batch:
    """What one micro-batch trains on.

    Attributes:
        tokens: int64 ids, shape (B, T), contiguous, on the loader's device.
        targets: int64, shape (B, T), contiguous: the next token of each, or −100: left out.
        doc_starts: bool, shape (B, T), true at the first token of a document; None: rows are taken
            as one document.
        position: Global sample index after this batch; a loader built with it goes on from here.
        n_tokens: Targets in it and in what the other ranks have of the same micro-batch, known
            without asking the device; 0: not counted.
    """

    tokens: Tensor
    targets: Tensor
    doc_starts: Tensor | None
    position: int
    n_tokens: int = 0

    def cut(self, length: int) -> Batch:
        """The same targets, each row (of a multiple of `length` tokens) in pieces, as views."""
        starts = self.doc_starts
        return replace(
            self,
            tokens=self.tokens.view(-1, length),
            targets=self.targets.view(-1, length),
            doc_starts=None if starts is None else starts.view(-1, length),
        )


def pad(tokens: Tensor, targets: Tensor, n_targets: Tensor) -> None:
    """Makes padding, token 0 without target, of what follows the `n_targets` (B,) of each row."""
    beyond = torch.arange(targets.shape[1], device=targets.device) >= n_targets[:, None]
    targets.masked_fill_(beyond, IGNORE)
    tokens.masked_fill_(beyond, 0)


def to_batch(
    stored: NDArray[Any],
    n_targets: Tensor | None,
    doc_starts: Tensor | None,
    position: int,
    n_tokens: int = 0,
) -> Batch:
    """A batch on the CPU, in fresh tensors.

    Args:
        stored: Ids as stored, shape (B, T + 1).
        n_targets: int64 (B,), of each row; what is right of them becomes padding. None: T.
        doc_starts: As in `Batch`.
        position: As in `Batch`.
        n_tokens: As in `Batch`.
    """
    rows, length = stored.shape
    tokens = torch.empty(rows, length - 1, dtype=torch.int64)
    targets = torch.empty_like(tokens)
    tokens.numpy()[:] = stored[:, :-1]
    targets.numpy()[:] = stored[:, 1:]
    if n_targets is not None:
        pad(tokens, targets, n_targets)
    return Batch(tokens, targets, doc_starts, position, n_tokens)
