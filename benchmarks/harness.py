"""What every benchmark shares: the machine, timing in turns, rivals that are checked, files.

The machine's load drifts by more than the differences of interest. So rivals take turns within each
round, and a speed-up is the median over rounds of the ratio within a round.
"""

import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import distributions
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.run.provenance import provenance
from fasttrain.storage import write_atomically

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PATHS = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
ENV = {"PYTHONPATH": os.pathsep.join(PATHS), "PYTHONUNBUFFERED": "1"}  # of child processes
Document = Mapping[str, Any]
PEERS = ("liger-kernel", "quack-kernels", "cut-cross-entropy", "torchao", "transformers")
PEERS += ("accelerate", "litgpt", "flash-attn")
OURS = "fasttrain"
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
# A chain of plain torch is off by up to 1e-2 in bf16, and in fp32 by 1e-6 · √(length of its sums).
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}[DTYPE]
LEAST_ROUNDS, MOST_ROUNDS = 3, 100  # of a comparison, as far as its budget goes
FLUSH_BYTES = 2**30  # many times any L2; overwriting it also gives the host time to run ahead
Call = Callable[..., Any]


def yield_to_others() -> None:
    """Use one thread where others keep all cores busy: more would wait for each other for long."""
    if os.getloadavg()[0] > 2 * (os.cpu_count() or 1):
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def machine() -> dict[str, Any]:
    """Return what a measurement depends on: device, threads, load, versions, installed peers."""
    cuda = torch.cuda.is_available()
    made = provenance(torch.device("cuda" if cuda else "cpu"))
    changed = "+" if made["uncommitted_changes"] else ""
    return {
        "commit": made["commit"] and f"{made['commit']:.7}{changed}",
        "device": made["device"],
        "kind": "cuda" if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        **{key: made[key] for key in ("python", "torch", "triton")},
        "peers": {name: d.version for name in PEERS for d in distributions(name=name)},
    } | ({"cuda": made["cuda"]} if cuda else {"isa": isa()})


def isa() -> str:
    """Return the kind of CPU that torch takes this one for: ``ATEN_CPU_CAPABILITY`` counts."""
    if platform.machine() in ("aarch64", "arm64"):
        return "ARM"
    name = torch.backends.cpu.get_cpu_capability().replace("AVX512", "AVX-512")
    return f"{name}+AMX" if name == "AVX-512" and torch.cpu._is_amx_tile_supported() else name


# For this process and its children: the compiler's cache takes code for AVX-512 as code for AVX2,
# which then skips half of the elements (torch 2.13).
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/benchmarks-{isa()}")


@functools.cache
def ceilings() -> dict[str, float]:
    """Measure a copy, reads and writes counted, and a product: bf16 8192³, on a CPU fp32 2048³."""
    n = 8192 if CUDA else 2048
    source = torch.zeros(2**30 if CUDA else 2**28, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
    product = torch.empty_like(a)

    def median_s(call: Call) -> float:
        return statistics.median([seconds(call) for _ in range(13)][3:])

    return {
        "copy_gb_per_s": 2 * source.nbytes / median_s(lambda: target.copy_(source)) / 1e9,
        "matmul_tflop_per_s": 2 * n**3 / median_s(partial(torch.mm, a, b, out=product)) / 1e12,
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


def seconds(call: Call, n_calls: int = 1, *, flush: bool = True) -> float:
    """Return the seconds of one call, the mean of ``n_calls`` in a row.

    On CUDA with ``flush`` the L2 cache is overwritten before each call, which device events time.
    Without it the host's clock times them all, gaps included: what a training step takes.
    """
    if CUDA and flush:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n_calls)]
        buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        for start, end in pairs:
            buffer.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return float(sum(start.elapsed_time(end) for start, end in pairs)) / n_calls / 1e3
    synchronize = torch.cuda.synchronize if CUDA else lambda: None
    synchronize()
    started = time.perf_counter()
    for _ in range(n_calls):
        call()
    synchronize()
    return (time.perf_counter() - started) / n_calls


def rounds_within(budget_s: float) -> Iterator[int]:
    """Count rounds until the budget is spent: `LEAST_ROUNDS`, or one if it alone takes as long."""
    started = time.perf_counter()
    for turn in range(MOST_ROUNDS):
        spent_s = time.perf_counter() - started
        if turn and spent_s > budget_s * (1 if turn >= LEAST_ROUNDS else turn):
            return
        yield turn


def turns(timed: Mapping[str, Call], rounds: Iterable[int]) -> dict[str, list[float]]:
    """Return the seconds that each way reports, for each round, by name."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    names = list(timed)
    for turn in rounds:
        first = turn % len(names)  # so that none is always first, or after the same one
        for name in names[first:] + names[:first]:
            times[name].append(timed[name]())
    return times


def comparison(times: Mapping[str, list[float]], **per_call: float) -> dict[str, Any]:
    """Return medians, the others' ratios to the first, and rates: ``per_call`` is what one does."""
    ours, *rivals = times
    median_s = {name: statistics.median(values) for name, values in times.items()}
    return {
        "times_s": dict(times),
        "median_s": median_s,
        "speedup": {k: statistics.median(map(truediv, times[k], times[ours])) for k in rivals},
    } | {
        rate: {name: amount / s for name, s in median_s.items()}
        for rate, amount in per_call.items()
    }


# ---- rivals --------------------------------------------------------------------------------------


def check(name: str, got: list[Tensor], exact: list[Tensor], tolerance: float = TOLERANCE) -> None:
    """Hold ‖got − exact‖ ≤ tolerance · ‖exact‖ for every output and gradient."""
    for i, (a, b) in enumerate(zip(got, exact, strict=True)):
        assert a.shape == b.shape, f"{name}: result {i} has shape {a.shape}, not {b.shape}"
        error = ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
        assert error <= tolerance, f"{name}: result {i} is off by {error:.1e} of its norm"


def gather(makers: Mapping[str, Callable[[], Call]]) -> tuple[dict[str, Call], dict[str, str]]:
    """Make the calls that are timed; return those that take part, and why the others do not.

    A maker raises where its rival fails or is wrong. A peer must not cost the others their figures.
    """
    calls: dict[str, Call] = {}
    left_out: dict[str, str] = {}
    for name, make in makers.items():
        try:
            calls[name] = make()
        except ImportError as error:
            left_out[name] = str(error)
        except Exception as error:
            if name.startswith(OURS):
                raise
            left_out[name] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return calls, left_out


# ---- files ---------------------------------------------------------------------------------------
# ``results/<processor>/<suite>.json``: a `document`, whose benchmarks have a ``name`` and either
# ``skipped``, the reason, or what was measured. Seconds are in ``times_s`` (a list over rounds for
# each rival, ours first), ``median_s`` and ``speedup``.


def slug(text: str) -> str:
    """Return ``text`` as a folder's name: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def processor_of(machine: Document) -> str:
    """Return what was measured: ``AMD EPYC, AVX2``, as torch saw it; ``NVIDIA H200``."""
    return machine["device"] + (f", {machine['isa']}" if machine["kind"] == "cpu" else "")


def folder_of(machine: Document) -> str:
    """Return the name of a processor's folder: ``amd-epyc-avx512``, ``nvidia-h100-80gb-hbm3``."""
    return slug(processor_of(machine).replace("AVX-", "AVX"))


def document(
    suite: str, benchmarks: Iterable[Document], machine: Document, ceilings: Document
) -> dict[str, Any]:
    """Return the contents of a file; ``machine`` is what `harness.machine` says."""
    return {
        "suite": suite,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": machine.get("commit"),
        "machine": {key: value for key, value in machine.items() if key != "commit"},
        "ceilings": dict(ceilings),
        "benchmarks": list(benchmarks),
    }


def write(path: Path, data: Document) -> None:
    """Write a file, in one piece or not at all: a run may be cut off at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Five significant digits: more is noise, and makes the files' differences unreadable.
    exact = json.dumps(data, allow_nan=False)
    rounded = json.loads(exact, parse_float=lambda digits: float(f"{float(digits):.5g}"))
    text = json.dumps(rounded, indent=1, ensure_ascii=False)
    # Lists of numbers on one line.
    text = re.sub(r"\[\s+([-\d.e+,\s]+?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text)
    write_atomically(path, f"{text}\n".encode())


def save(results: Path, data: Document) -> None:
    """Write a `document` to its place below ``results``."""
    write(results / folder_of(data["machine"]) / f"{data['suite']}.json", data)


def read_all(folder: Path = RESULTS, processor: str = "*") -> list[dict[str, Any]]:
    """Return every file of every processor, or of one folder, in the order of their paths."""
    found = sorted(folder.glob(f"{processor}/*.json"))
    return [json.loads(path.read_text("utf-8")) for path in found]


# ---- tables --------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown; of a row what has a heading."""
    lines = [f"| {' | '.join(map(str, row[: len(head)]))} |\n" for row in (head, *rows)]
    return "".join([lines[0], f"|{'---|' * len(head)}\n", *lines[1:]])


def folded(summary: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown that is folded away under a summary."""
    return f"<details><summary>{summary}</summary>\n\n{table(head, rows)}\n</details>\n"
