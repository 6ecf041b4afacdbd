"""What every benchmark shares: timing in turns, rivals that are checked, facts of the machine.

The machine's load drifts by more than the differences of interest. So rivals take turns within each
round, and a speed-up is the median over rounds of the ratio within a round. An installed peer that
fails, or whose result is off, is left out with the reason: it must not cost the others their
figures. Ours must agree, or the benchmark fails.
"""

import functools
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.store import ENV
from fasttrain.run.provenance import provenance

PEERS = (
    *("liger-kernel", "quack-kernels", "cut-cross-entropy", "torchao"),
    *("transformers", "accelerate", "litgpt"),
)
OURS = "fasttrain"
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
# A chain of plain torch is off by up to 1e-2 in bf16, and in fp32 by 1e-6 · √(length of its sums).
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
LEAST_ROUNDS, MOST_ROUNDS = 3, 100  # of a comparison, as far as its budget goes
FLUSH_BYTES = 2**30  # many times any L2; overwriting it also gives the host time to run ahead
Call = Callable[..., Any]


def yield_to_others() -> None:
    """Use one thread where others keep all cores busy.

    Threads that wait for each other would take minutes for milliseconds there.
    """
    if os.getloadavg()[0] > 2 * (os.cpu_count() or 1):
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def machine() -> dict[str, Any]:
    """Return what a measurement depends on: device, threads, load, versions, installed peers."""
    cuda = torch.cuda.is_available()
    made = provenance(torch.device("cuda" if cuda else "cpu"))
    found = importlib.metadata.distributions()
    installed = {(d.name or "").lower().replace("_", "-"): d.version for d in found}
    changed = "+" if made["uncommitted_changes"] else ""
    return {
        "commit": made["commit"] and f"{made['commit']:.7}{changed}",
        "device": made["device"],
        "kind": "cuda" if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        **{key: made[key] for key in ("python", "torch", "triton")},
        "peers": {name: installed[name] for name in PEERS if name in installed},
    } | ({"cuda": made["cuda"]} if cuda else {"isa": isa()})


def isa() -> str:
    """Return the kind of CPU that torch takes this one for, by which its kernels differ.

    ``ATEN_CPU_CAPABILITY=avx2`` makes AVX2 of a newer one.
    """
    if platform.machine() in ("aarch64", "arm64"):
        return "ARM"
    name = torch.backends.cpu.get_cpu_capability()
    if name != "AVX512":
        return str(name)
    return "AVX-512+AMX" if torch.cpu._is_amx_tile_supported() else "AVX-512"


# For this process and its children: the compiler's cache takes code for AVX-512 as code for AVX2,
# which then skips half of the elements (torch 2.13).
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/benchmarks-{isa()}")


@functools.cache
def ceilings() -> dict[str, float]:
    """Measure this device: a copy, reads and writes counted, and a matrix product of random data.

    The product is bf16 8192³ on CUDA and fp32 2048³ on a CPU. Medians; once a process.
    """
    n = 8192 if CUDA else 2048
    source = torch.zeros(2**30 if CUDA else 2**28, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
    product = torch.empty_like(a)
    calls = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b, out=product)}
    median = comparison(in_turn(calls, budget_s=0.5, warmup=3))["median_s"]
    return {
        "copy_gb_per_s": 2 * source.nbytes / median["copy"] / 1e9,
        "matmul_tflop_per_s": 2 * n**3 / median["matmul"] / 1e12,
    }


def run(*command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run Python to its end; return what it printed."""
    process = subprocess.run(
        [sys.executable, *command], cwd=cwd, env={**os.environ, **ENV, **(env or {})},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if process.returncode:
        printed = process.stdout + process.stderr
        error = RuntimeError(printed.strip().rpartition("\n")[2])
        error.add_note(printed)
        raise error
    return process.stdout


# ---- timing --------------------------------------------------------------------------------------


@functools.cache
def _flush_buffer() -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


def seconds(call: Call, n_calls: int = 1, *, flush: bool = True) -> float:
    """Return the seconds of one call, the mean of ``n_calls`` in a row.

    On CUDA with ``flush`` the L2 cache is overwritten before each call, which device events time.
    Without it the calls follow each other and the host's clock times them all, gaps included: what
    a training step takes.
    """
    if not CUDA or not flush:
        synchronize()
        started = time.perf_counter()
        for _ in range(n_calls):
            call()
        synchronize()
        return (time.perf_counter() - started) / n_calls
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n_calls)]
    for start, end in pairs:
        _flush_buffer().zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return float(sum(start.elapsed_time(end) for start, end in pairs)) / n_calls / 1e3


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def rounds_within(budget_s: float) -> Iterator[int]:
    """Count rounds until the budget is spent.

    At least `LEAST_ROUNDS`, but for rounds so long that each alone takes the budget: one of these.
    """
    started = time.perf_counter()
    for turn in range(MOST_ROUNDS):
        spent_s = time.perf_counter() - started
        if turn and spent_s > budget_s * (1 if turn >= LEAST_ROUNDS else turn):
            return
        yield turn


def in_turn(
    calls: Mapping[str, Call], *, budget_s: float, n_calls: int = 1, warmup: int = 2,
    flush: bool = True,
) -> dict[str, list[float]]:  # fmt: skip
    """Time callables in turns; return the seconds of a call, for each round, by name.

    ``n_calls`` are made in one timing: more than one where a call is too short for the clock.
    ``warmup`` is made of each before the first timing, for compilation and caches.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    timed = {k: partial(seconds, call, n_calls, flush=flush) for k, call in calls.items()}
    return turns(timed, rounds_within(budget_s))


def turns(
    timed: Mapping[str, Callable[[], float]], rounds: Iterable[int]
) -> dict[str, list[float]]:
    """Return the seconds that each way reports, for each round, by name."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    names = list(timed)
    for turn in rounds:
        first = turn % len(names)  # so that none is always first, or after the same one
        for name in names[first:] + names[:first]:
            times[name].append(timed[name]())
    return times


def comparison(times: Mapping[str, list[float]], **per_call: float) -> dict[str, Any]:
    """Return medians, and how many times as long as the first each of the others takes.

    ``per_call`` names rates such as ``gb_per_s`` and how much of each a call does.
    """
    ours, *rivals = times
    median_s = {name: statistics.median(values) for name, values in times.items()}

    def ratio(rival: str) -> float:
        pairs = zip(times[rival], times[ours], strict=True)
        return statistics.median(theirs / own for theirs, own in pairs)

    return {
        "times_s": dict(times),
        "median_s": median_s,
        "speedup": {name: ratio(name) for name in rivals},
    } | {
        rate: {name: amount / s for name, s in median_s.items()}
        for rate, amount in per_call.items()
    }


# ---- rivals --------------------------------------------------------------------------------------


def check(name: str, got: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    """Hold ‖got − exact‖ ≤ tolerance · ‖exact‖ for every output and gradient."""
    for i, (a, b) in enumerate(zip(got, exact, strict=True)):
        assert a.shape == b.shape, f"{name}: result {i} has shape {a.shape}, not {b.shape}"
        error = ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
        assert error <= tolerance, f"{name}: result {i} is off by {error:.1e} of its norm"


def gather(
    makers: Mapping[str, Callable[[], Call]], verify: Callable[[str, Call], None]
) -> tuple[dict[str, Call], dict[str, str]]:
    """Make and verify the rivals; return those that take part, and why the others do not.

    ``verify`` raises where the op of that name does not compute what the reference does.
    """
    ops: dict[str, Call] = {}
    left_out: dict[str, str] = {}
    for name, make in makers.items():
        try:
            op = make()
            verify(name, op)
            ops[name] = op
        except ImportError as error:
            left_out[name] = str(error)
        except Exception as error:
            if name.startswith(OURS):
                raise
            left_out[name] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return ops, left_out
