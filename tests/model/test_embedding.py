"""The table of embeddings: torch's gradient, under an operation's name of its own."""

import torch

from fasttrain.model.transformer import Embedding


def test_the_gradient_is_torchs_and_its_op_is_registered_as_torch_wants_it() -> None:
    index = torch.tensor([[3, 0, 3], [3, 1, 0]])
    table = Embedding(5, 4)
    ops = torch.ops.fasttrain
    dy = torch.randn(3, 2, 4).transpose(0, 1)  # strided, as a caller may leave it
    torch.library.opcheck(ops.embedding_backward, (dy, index, 5))
    (expected,) = torch.autograd.grad(table(index), table.weight, dy)
    (actual,) = torch.autograd.grad(ops.embedding(index, table.weight), table.weight, dy)
    assert torch.equal(actual, expected)
    assert torch.equal(ops.embedding(index, table.weight), table(index))
