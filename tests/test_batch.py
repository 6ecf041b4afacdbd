"""A micro-batch, and the same cut into shorter rows."""

import numpy as np
import torch

from fasttrain.data.loader import IGNORE, Batch, to_batch
from fasttrain.model.attention import attention_mask

STORED = np.arange(2 * 13, dtype=np.uint16).reshape(2, 13)


def of_twelve(starts_at: tuple[int, ...]) -> Batch:
    starts = torch.zeros(2, 12, dtype=torch.bool)
    starts[:, 0] = True
    starts[0, list(starts_at)] = True
    return to_batch(STORED, torch.tensor([12, 5]), starts, 7)


def test_a_cut_batch_has_the_same_targets_in_shorter_rows() -> None:
    whole = of_twelve((3, 9))
    cut = whole.cut(4)
    assert cut.tokens.shape == cut.targets.shape == (6, 4)
    assert cut.position == 7
    assert torch.equal(cut.tokens[:3].flatten(), torch.arange(12))
    assert torch.equal(cut.targets[:3], cut.tokens[:3] + 1)
    assert cut.targets[3:].flatten().tolist() == [*range(14, 19), *7 * [IGNORE]]
    assert cut.tokens.data_ptr() == whole.tokens.data_ptr()
    assert cut.doc_starts is not None
    assert cut.doc_starts.nonzero().tolist() == [[0, 0], [0, 3], [2, 1], [3, 0]]
    assert Batch(whole.tokens, whole.targets, None, 7).cut(6).doc_starts is None


def test_attention_in_a_piece_without_a_start_is_that_of_one_document() -> None:
    """A piece that begins inside a document has no mark there, and needs none."""
    starts = of_twelve((3, 9)).cut(4).doc_starts
    assert starts is not None
    marked = starts.clone()
    marked[:, 0] = True
    cpu = torch.device("cpu")
    mask, expected = (
        attention_mask(0, 4, cpu, window=None, doc_starts=s, flex=False) for s in (starts, marked)
    )
    assert isinstance(mask, torch.Tensor)
    assert isinstance(expected, torch.Tensor)
    assert torch.equal(mask, expected)
    assert not torch.equal(mask[0], mask[1])
