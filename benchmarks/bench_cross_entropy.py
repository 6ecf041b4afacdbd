"""cross_entropy, forward and backward, against torch and the installed peers."""

import pytest
import torch
from fasttrain_kernels.cross_entropy import cross_entropy, cross_entropy_reference

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# (rows, vocabulary, dtype): on a CPU what a small trainer meets, on a GPU the sizes of the targets.
SIZES = (
    [
        (8192, 128256, torch.bfloat16),
        (8192, 50304, torch.bfloat16),
        (8192, 50257, torch.bfloat16),
        (8192, 32000, torch.bfloat16),
    ]
    if CUDA
    else [(2048, 4096, torch.float32), (128, 50304, torch.float32), (128, 50257, torch.float32)]
)


def torch_loss(logits, targets):
    return torch.nn.functional.cross_entropy(logits, targets)


def liger():
    module = pytest.importorskip("liger_kernel.transformers.functional")
    return lambda logits, targets: module.liger_cross_entropy(logits, targets)[0]


def quack():
    module = pytest.importorskip("quack.cross_entropy")
    return lambda logits, targets: module.cross_entropy(logits, targets, reduction="mean")


PEERS = {
    "torch": lambda: torch_loss,
    "torch.compile": lambda: torch.compile(torch_loss),
    "liger": liger,
    "quack": quack,
}


def step(loss_of, logits, targets):
    """Forward and backward, from and to the logits."""
    leaf = logits.detach().requires_grad_()
    loss = loss_of(leaf, targets)
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("rows", "vocabulary", "dtype"), SIZES)
def test_cross_entropy(compare, benchmark, rows, vocabulary, dtype, peer):
    """Time against one peer; both must first agree with fp32 torch."""
    if not CUDA and peer in ("liger", "quack"):
        pytest.skip(f"{peer} needs a CUDA device")
    if not CUDA and peer == "torch.compile" and vocabulary != SIZES[0][1]:
        pytest.skip("compiled once on a CPU, at the first size")
    rival = PEERS[peer]()
    torch.manual_seed(0)
    # Two inputs in turn, so that neither is found in a cache.
    inputs = [
        (
            torch.randn(rows, vocabulary, device=DEVICE, dtype=dtype),
            torch.randint(0, vocabulary, (rows,), device=DEVICE),
        )
        for _ in range(2)
    ]
    logits, targets = inputs[0]
    exact, grad = step(cross_entropy_reference, logits[:64].float(), targets[:64])
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for loss_of in (cross_entropy, rival):
        loss, own = step(loss_of, logits[:64].clone(), targets[:64])
        torch.testing.assert_close(loss.float(), exact, rtol=0, atol=bound)
        torch.testing.assert_close(own.float(), grad, rtol=0, atol=bound / 64)

    def turns(loss_of):
        calls = [0]

        def call():
            calls[0] += 1
            step(loss_of, *inputs[calls[0] % 2])

        return call

    result = compare(
        {"fasttrain": turns(cross_entropy), peer: turns(rival)}, rounds=20 if CUDA else 5
    )
    n_bytes = 2 * rows * vocabulary * dtype.itemsize
    benchmark.extra_info["gb_per_s"] = n_bytes / result.median_s["fasttrain"] / 1e9
    assert result.median_s["fasttrain"] > 0
