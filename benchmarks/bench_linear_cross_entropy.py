"""linear_cross_entropy, forward and backward: time against torch and peers, and peak memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fasttrain_kernels.linear_cross_entropy import linear_cross_entropy

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# (rows, dim, vocabulary, dtype)
SIZES = (
    [(4096, 4096, 128256, torch.bfloat16), (32768, 768, 50304, torch.bfloat16)]
    if CUDA
    else [
        (4096, 256, 1024, torch.float32),
        (2048, 256, 4096, torch.float32),
        (768, 128, 65, torch.float32),
        (512, 768, 50304, torch.float32),
    ]
)


def torch_eager(hidden, weight, targets):
    logits = torch.nn.functional.linear(hidden, weight)
    return torch.nn.functional.cross_entropy(logits, targets)


def torch_chunked():
    op = getattr(torch.nn.functional, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if op is None or options is None:
        pytest.skip(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return lambda hidden, weight, targets: op(
        hidden, weight, targets, options=options(batch_chunk_size=256, chunking_method=None)
    )


def liger():
    module = pytest.importorskip("liger_kernel.transformers.functional")
    return lambda h, w, t: module.liger_fused_linear_cross_entropy(h, w, t)


def quack():
    module = pytest.importorskip("quack.linear_cross_entropy")
    return lambda h, w, t: module.chunked_linear_cross_entropy(h, w, t, reduction="mean")


def cut_cross_entropy():
    module = pytest.importorskip("cut_cross_entropy")
    return lambda h, w, t: module.linear_cross_entropy(h, w, t)


PEERS = {
    "torch": lambda: torch_eager,
    "torch.compile": lambda: torch.compile(torch_eager),
    "torch chunked": torch_chunked,
    "liger": liger,
    "quack": quack,
    "cut_cross_entropy": cut_cross_entropy,
}


def step(loss_of, hidden, weight, targets):
    """Forward and backward to both operands."""
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = loss_of(h, w, targets)
    loss.backward()
    return loss.detach().float(), h.grad.float(), w.grad.float()


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("rows", "dim", "vocabulary", "dtype"), SIZES)
def test_linear_cross_entropy(compare, benchmark, rows, dim, vocabulary, dtype, peer):
    """Time against one peer; both must first agree with plain torch in fp32."""
    if not CUDA and peer in ("liger", "quack", "cut_cross_entropy"):
        pytest.skip(f"{peer} needs a CUDA device")
    if not CUDA and peer == "torch.compile":
        pytest.skip("on a CPU the products dominate: a compiler changes nothing")
    rival = PEERS[peer]()
    torch.manual_seed(0)
    hidden = torch.randn(rows, dim, device=DEVICE, dtype=dtype)
    weight = (torch.randn(vocabulary, dim, device=DEVICE) / dim**0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    few = 32
    exact = step(torch_eager, hidden[:few].float(), weight.float(), targets[:few])
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for loss_of in (linear_cross_entropy, rival):
        for a, b in zip(step(loss_of, hidden[:few], weight, targets[:few]), exact, strict=True):
            torch.testing.assert_close(a, b, rtol=bound, atol=bound)
    calls = {"fasttrain": linear_cross_entropy, peer: rival}
    rounds = 20 if CUDA else (2 if vocabulary > 10000 else 5)
    result = compare(
        {name: (lambda f=f: step(f, hidden, weight, targets)) for name, f in calls.items()},
        rounds=rounds,
        warmup=1,
    )
    flop = 6 * rows * dim * vocabulary
    benchmark.extra_info["tflop_per_s"] = flop / result.median_s["fasttrain"] / 1e12
    assert result.median_s["fasttrain"] > 0


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


def test_peak_memory(benchmark):
    """At most an eighth of eager's, at V=50304."""
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
    benchmark.extra_info.update(peak_bytes=ours, eager_peak_bytes=eager)
    assert ours <= eager / 8
