"""Each fused operation on the device at hand: is it right, how fast is each path, which is taken.

An operation is right where its error against the same formula in fp64 is at most twice that of
plain torch in the same dtype, plus 1e-5 (1e-3 in half precision). Paths are timed forward and
backward: ``ours`` as `fasttrain_kernels` runs it eagerly, ``torch`` as a plain composition,
``compiled`` as what torch.compile fuses of that composition.

Legend: N rows, D dim, F hidden_dim, V vocabulary, H heads, K head_dim.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.benchmark as benchmark
from fasttrain_kernels import FusedAdamW, catalogue
from fasttrain_kernels.catalogue import Op, results
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fasttrain.device import (
    resolve_attention,
    resolve_device,
    resolve_precision,
    set_matmul_precision,
)
from fasttrain.preflight.memory import device_memory
from fasttrain.printing import say

# A logit of `linear_cross_entropy_reference` in fp64 costs most: it and its gradients at the peak.
LOSS_BYTES = 44
# What the trainer takes and why. Operations dispatch so by themselves: within torch.compile those
# that only move memory are plain compositions for it to fuse. Figures: this command on a CPU
# (benchmarks/EXPERIMENTS.md), ms for forward and backward. On CUDA: not yet measured.
_FUSED = "the compiler's fusion in a compiled step, ours in any other"
CHOICES = {
    "rms_norm": f"{_FUSED} (compiled 0.67, ours 1.03, torch 8.06)",
    "swiglu": f"{_FUSED}, which keeps less for backward (compiled 3.05, ours 5.04, torch 4.69)",
    "relu_squared": f"{_FUSED} (compiled 1.38, ours 2.34, torch 4.11)",
    "rope": f"{_FUSED} (compiled 0.60, ours 1.38, torch 4.28)",
    "linear_cross_entropy": "ours always, in chunks of logits (ours 89, compiled 112, torch 192)",
    "adamw": "ours always: one pass over all parameters (ours 2.7, torch 9.1)",
}


class OpReport(NamedTuple):
    """One operation on one device: its error against fp64, relative to the largest value."""

    name: str
    error: float
    tolerance: float  # what the error may be
    ms: dict[str, float]  # median of each path, forward and backward


def _ops(device: torch.device, dtype: str) -> Iterator[tuple[str, Op]]:
    n, d, f, v, k = 2048, 256, 1024, 4096, 64
    if device.type == "cuda":
        d, f, v = 1024, 4096, 32768
        rows = max(int(0.8 * device_memory(device) / (LOSS_BYTES * v)), 16)
        n = min(16384, 1 << rows.bit_length() - 1)
    torch.manual_seed(0)
    with device:
        norm = catalogue.rms_norm(dtype, d, n)
        assert norm.torch is not None
        yield "rms_norm", norm._replace(reference=norm.torch)
        yield "swiglu", catalogue.swiglu(dtype, f, n)
        yield "relu_squared", catalogue.relu_squared(dtype, f, n)
        yield "rope", catalogue.apply_rope(dtype, k, n // 8, 8, (d // k, d // k))
        yield "linear_cross_entropy", catalogue.linear_cross_entropy(dtype, v, d, n)
        yield "adamw", catalogue.adamw("fp32", 4 << 20)


def _error(values: list[Tensor], truth: list[Tensor]) -> float:
    largest = [
        (a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)
        for a, b in zip(values, truth, strict=True)
    ]
    return torch.stack(largest).max().item()  # NaN where one is


def _median_ms(run: Callable[[], object], budget_s: float = 0.5) -> float:
    threads = torch.get_num_threads()
    timer = benchmark.Timer("run()", globals={"run": run}, num_threads=threads)
    return 1000 * float(timer.blocked_autorange(min_run_time=budget_s).median)


def _step(kind: Callable[..., torch.optim.Optimizer], op: Op) -> Callable[[], object]:
    """Return a step of AdamW on 4 M parameters."""
    shapes = [(1024, 1024)] * 4 + [(1024,)] * 8
    params = [torch.randn(s, device=op.inputs[0].device).requires_grad_() for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return kind(params, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1).step


def check_kernels(device: torch.device) -> Iterator[OpReport]:
    """Check and time each operation on ``device``, in the dtype that a run would use there."""
    auto = resolve_precision("auto", device)
    set_matmul_precision(auto)
    for name, op in _ops(device, auto.name):
        dtype = torch.float32 if name == "adamw" else auto.compute
        truth = results(op.reference, op, torch.float64)
        error, plain = (_error(results(fn, op, dtype), truth) for fn in (op.ours, op.reference))
        del truth
        paths = {"ours": op.ours, "torch": op.reference}
        paths["compiled"] = torch.compile(op.reference, dynamic=False)
        runs: dict[str, Callable[[], object]]
        runs = {path: functools.partial(results, fn, op, dtype) for path, fn in paths.items()}
        if name == "adamw":
            runs = {"ours": _step(FusedAdamW, op), "torch": _step(torch.optim.AdamW, op)}
        tolerance = 2 * plain + (1e-5 if dtype == torch.float32 else 1e-3)
        yield OpReport(name, error, tolerance, {path: _median_ms(f) for path, f in runs.items()})


def attention_ms(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Time those of SDPA's kernels that ``run.attention`` names and that run here, both ways."""
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    shape = (8, 16, 2048, 64) if device.type == "cuda" else (1, 2, 128, 64)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3))

    def run() -> None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(y, (q, k, v), y)

    times = {}
    for name, backend in backends.items():
        with warnings.catch_warnings(action="ignore"), sdpa_kernel(backend), suppress(RuntimeError):
            times[name] = _median_ms(run)  # torch warns of why a kernel does not run here
    return times


def show_kernels(device_name: str) -> bool:
    """Show a line for each operation; return whether all are right."""
    device = resolve_device(device_name)
    all_right, dtype = True, resolve_precision("auto", device).compute
    for report in check_kernels(device):
        all_right &= (right := report.error <= report.tolerance)  # NaN is not
        times = "  ".join(f"{name} {ms:.3g} ms" for name, ms in report.ms.items())
        fastest = min(report.ms, key=report.ms.__getitem__)
        say(
            f"{'pass' if right else 'FAIL'}  {report.name:<21} error {report.error:.1e} "
            f"(may be {report.tolerance:.1e})  {times}  fastest: {fastest}"
        )
        say(f"      → {CHOICES[report.name]}")
    if device.type == "cuda":
        chosen = resolve_attention("auto", device, deterministic=False)
        shown = "  ".join(f"{k} {ms:.3g} ms" for k, ms in attention_ms(device, dtype).items())
        say(f"      attention             {shown or 'neither flash nor cudnn runs here'}")
        say(f"      → run.attention=auto takes {chosen}; set the faster one")
    return all_right
