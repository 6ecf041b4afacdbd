"""linear_cross_entropy, forward and backward: time against torch and peers, and peak memory."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fasttrain_kernels.linear_cross_entropy import linear_cross_entropy
from torch import Tensor

from benchmarks.rivals import CUDA, DEVICE, DTYPE, TOLERANCE, Op, check, gather, needs_cuda

# (rows, dim, vocabulary)
SIZES = (
    [(4096, 4096, 128256), (32768, 768, 50304)]
    if CUDA
    else [(4096, 256, 1024), (2048, 256, 4096), (768, 128, 65), (512, 768, 50304)]
)
FULL_SIZES = [] if CUDA else [(4096, 768, 50304)]


def torch_eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight)
    return torch.nn.functional.cross_entropy(logits, targets)


def torch_compiled() -> Op:
    if not CUDA:
        raise ImportError("on a CPU the products dominate: a compiler changes nothing")
    return torch.compile(torch_eager, dynamic=False)


def torch_chunked() -> Op:
    op = getattr(torch.nn.functional, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if op is None or options is None:
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    # Its default options are slower and take as much memory.
    chunked = options(batch_chunk_size=256, chunking_method=None)
    return lambda hidden, weight, targets: op(hidden, weight, targets, options=chunked)


def liger() -> Op:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def quack() -> Op:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy


def cut_cross_entropy() -> Op:
    from cut_cross_entropy import linear_cross_entropy as op

    return op


MAKERS = {
    "fasttrain": lambda: linear_cross_entropy,
    "torch": lambda: torch_eager,
    "torch.compile": torch_compiled,
    "torch chunked": torch_chunked,
    "liger": needs_cuda(liger),
    "quack": needs_cuda(quack),
    "cut_cross_entropy": needs_cuda(cut_cross_entropy),
}


def step(op: Op, hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """Forward and backward to both operands."""
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = op(h, w, targets)
    loss.backward()
    assert h.grad is not None
    assert w.grad is not None
    return [loss.detach(), h.grad, w.grad]


@pytest.mark.parametrize(("rows", "dim", "vocabulary"), SIZES + FULL_SIZES)
def test_linear_cross_entropy(
    compare: Any, full: bool, rows: int, dim: int, vocabulary: int
) -> None:
    if (rows, dim, vocabulary) in FULL_SIZES and not full:
        pytest.skip("takes two minutes: --full")
    torch._dynamo.reset()
    torch.manual_seed(0)
    hidden = torch.randn(rows, dim, device=DEVICE, dtype=DTYPE)
    weight = (torch.randn(vocabulary, dim, device=DEVICE) / dim**0.5).to(DTYPE)
    targets = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    few = 128 if vocabulary == 50304 and not CUDA else rows
    exact = step(torch_eager, hidden[:few].float(), weight.float(), targets[:few])

    def verify(name: str, op: Op) -> None:
        check(name, step(op, hidden[:few], weight, targets[:few]), exact, TOLERANCE[DTYPE])

    ops, left_out = gather(MAKERS, verify)
    calls = {name: (lambda op=op: step(op, hidden, weight, targets)) for name, op in ops.items()}
    rates = {"tflop_per_s": 6 * rows * dim * vocabulary / 1e12}
    compare(calls, warmup=1, left_out=left_out, per_call=rates)


PEAK = """
import torch
from fasttrain_kernels.linear_cross_entropy import linear_cross_entropy as ours
def eager(h, w, t):
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(h, w), t)
h = torch.randn(2048, 64, requires_grad=True)
w = torch.randn(50304, 64, requires_grad=True)
t = torch.randint(0, 50304, (2048,))
def peak():  # not ru_maxrss, which a child process inherits
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
{f}(h[:1], w, t[:1]).backward()  # libraries, thread pools and the weight's gradient
before = peak()
{f}(h, w, t).backward()
print((peak() - before) * 1024)
"""


def peak_bytes(name: str) -> int:
    """Return by how much a process grows for one forward and backward at V=50304."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK.replace("{f}", name)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return int(done.stdout)


def test_peak_memory(benchmark: Any) -> None:
    """By how much ours and eager grow at V=50304."""
    if CUDA:
        weight = torch.randn(50304, 768, device=DEVICE, dtype=torch.bfloat16)
        hidden = torch.randn(32768, 768, device=DEVICE, dtype=torch.bfloat16)
        targets = torch.randint(0, 50304, (32768,), device=DEVICE)
        peaks = []
        for loss_of in (linear_cross_entropy, torch_eager):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(loss_of, hidden, weight, targets)
            peaks.append(torch.cuda.max_memory_allocated() - before)
        ours, eager = peaks
        benchmark.pedantic(step, args=(linear_cross_entropy, hidden, weight, targets))
    else:
        if not Path("/proc/self/status").exists():
            pytest.skip("the peak memory of a process is read from Linux's /proc")
        ours = benchmark.pedantic(peak_bytes, args=("ours",))
        eager = peak_bytes("eager")
    benchmark.extra_info["peak_bytes"] = {"fasttrain": ours, "torch": eager}
