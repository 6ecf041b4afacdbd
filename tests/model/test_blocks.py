"""Activation checkpointing: the same bits, and less kept between forward and backward."""

import gc
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain.config import ModelConfig
from fasttrain.model.runtime import prepare_blocks
from fasttrain.model.transformer import Transformer

KINDS = ["none", "full", "selective"]


class Kept(TorchDispatchMode):
    """Counts the bytes of what was made within it and still lives."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def n_bytes(self) -> int:
        gc.collect()
        return sum(n for ref, n in self.made.values() if not ref.expired())


def run(
    kind: str, *, n_layers: int = 6, compiled: bool = False
) -> tuple[Tensor, list[Tensor], int]:
    """Return the loss, the gradients and the bytes kept for the backward pass."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=64, dim=64, n_layers=n_layers, n_heads=4, dropout=0.1)
    model = Transformer(config, seq_len=64)
    prepare_blocks(model, activation_checkpointing=kind, mode="off", sharded=False)
    tokens = torch.randint(64, (4, 64))

    def loss_of(tokens: Tensor) -> Tensor:
        return model(tokens).square().mean()

    fn = loss_of
    if compiled:
        model.train(False)  # what a compiler draws for dropout is its own
        fn = torch.compile(loss_of, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.manual_seed(1)
    with Kept() if not compiled else torch.enable_grad() as kept:
        loss = fn(tokens)
    n_bytes = kept.n_bytes() if isinstance(kept, Kept) else 0
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None], n_bytes


def test_the_same_bits_from_less_memory() -> None:
    found = {kind: run(kind) for kind in KINDS}
    loss, grads, everything = found["none"]
    for kind in ("full", "selective"):
        torch.testing.assert_close(found[kind][0], loss, rtol=0, atol=0)
        torch.testing.assert_close(found[kind][1], grads, rtol=0, atol=0)
    # Six layers of 1 MiB and more: full keeps an input of 64 KiB of each.
    assert found["full"][2] < 0.3 * everything
    assert found["full"][2] < found["selective"][2] < 0.8 * everything


def test_it_compiles_to_one_graph() -> None:
    found = {kind: run(kind, n_layers=2, compiled=True) for kind in KINDS}
    for kind in ("full", "selective"):
        torch.testing.assert_close(found[kind][:2], found["none"][:2])
