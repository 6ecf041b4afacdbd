"""Everything that needs a GPU, in one command of at most nine minutes: ``make gpu``.

Each stage is a process with its own time limit, so that one that fails or hangs does not cost the
others theirs; what the ones before it left over it may use, too. Figures are written as they come,
to ``benchmarks/results/<device>/``, or with logs to the folder that ``OUT`` names.
Without a CUDA device every stage runs at small shapes on the CPU; nothing is kept of it.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from benchmarks import harness, report
from benchmarks.harness import ENV, RESULTS, ROOT

UNHURRIED = 3  # times as long for a rehearsal: on a busy CPU an import alone may take a minute
GRACE_S = 5.0  # between asking a stage to end and ending it
# Of each suite of benchmarks its file and its seconds.
SUITES = {
    "linear_cross_entropy": ("ops", 25),
    "cross_entropy": ("ops", 25),
    **dict.fromkeys(("rms_norm", "adamw", "swiglu", "rope", "muon"), ("ops", 15)),
    "run-gpt2-124m-bf16": ("trainers", 65),
    "run-llama-1b-bf16": ("trainers", 65),
    "run-llama-1b-fp8": ("trainers", 45),
    "trainers": ("trainers", 100),  # where NANOGPT_DIR names a checkout
    "run-base": ("trainers", 45),
}
# Tests that choose a device; those of the interpreter and the compiler alone do not need one here.
NEEDS_DEVICE = re.compile(r"triton_device|is_available\(\)")
NOT_THERE = re.compile(r"skipif\(\s*torch\.cuda\.is_available\(\)|/test_benchmarks")
TINY_KERNELS = "not 50304 and not 50257 and not 124M and not muon_step and not memory"


class Stage(NamedTuple):
    """One process."""

    name: str
    command: tuple[str, ...]
    limit_s: float


def device_tests() -> list[str]:
    """Return the test files whose result depends on the device, but for those of this command."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    texts = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in paths}
    found = {name for name, text in texts.items() if NEEDS_DEVICE.search(text)}
    return sorted(name for name in found if not NOT_THERE.search(f"{name}\n{texts[name]}"))


def plan(results: Path, *, cuda: bool) -> list[Stage]:
    """Return the stages, with ``results`` the folder of all devices; without one all is small."""
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    workers = str(min(8, os.cpu_count() or 1))
    tests = ("-n", workers, "--timeout=90", "--maxfail=25") if cuda else ("-n0", "--collect-only")
    stages = [Stage("tests", (*pytest, *tests, *device_tests()), 75)]
    for suite, (file, limit_s) in SUITES.items():
        small = () if cuda else ("--rehearse", *(("-k", TINY_KERNELS) if file == "ops" else ()))
        options = ("--benchmark-only", "--results", str(results), "--suite", suite, *small)
        stages.append(Stage(suite, (*pytest, f"benchmarks/bench_{file}.py", *options), limit_s))
    return stages if cuda else [s._replace(limit_s=UNHURRIED * s.limit_s) for s in stages]


def run_stage(stage: Stage, limit_s: float, log: Path) -> str:
    """Run a stage with its output in ``log``; return ``ok`` or what went wrong."""
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=os.environ | ENV, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit_s)
            return "ok" if status == 0 else f"failed with exit status {status}"
        except subprocess.TimeoutExpired:
            return f"out of time after {limit_s:.0f} s"
        finally:  # with all its children: asked first, so that pytest can say what it has done
            for number in (signal.SIGINT, signal.SIGKILL):
                with suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(GRACE_S)


def run_all(stages: Sequence[Stage], work: Path) -> bool:
    """Run the stages in order, a line for each, logs in ``work``; return whether all went well."""
    deadline, well = time.monotonic(), True
    for stage in stages:
        begun, log = time.monotonic(), work / f"{stage.name}.log"
        deadline += stage.limit_s
        outcome = run_stage(stage, max(1.0, deadline - begun), log)
        print(f"{stage.name:28} {time.monotonic() - begun:5.0f} s  {outcome}", flush=True)
        if outcome != "ok":
            well = False
            text = log.read_text("utf-8", errors="replace")
            last = [line for line in text.splitlines() if line.strip()][-12:]
            print(*(f"    {line[:200]}" for line in last), sep="\n", flush=True)
    return well


def main() -> int:
    started, machine = time.monotonic(), harness.machine()
    cuda = machine["kind"] == "cuda"
    with tempfile.TemporaryDirectory(prefix="fasttrain-gpu-") as temporary:
        work = results = Path(temporary)
        if cuda:
            out = os.environ.get("OUT")
            work, results = (Path(out), Path(out) / "results") if out else (work, RESULTS)
            print(f"{machine['device']}, torch {machine['torch']}; figures go to {results}")
        else:
            print("no CUDA device: rehearsal at small shapes on the CPU; no figure is kept")
            # Threads that wait for each other on a busy machine take minutes for milliseconds.
            os.environ["OMP_NUM_THREADS"] = "1"
        well = run_all(plan(results, cuda=cuda), work)
        documents = harness.read_all(results, harness.folder_of(machine))
        if cuda and documents:
            print(report.plain_text(documents))
    print(f"{'done' if well else 'with failures'} after {time.monotonic() - started:.0f} s")
    return 0 if well else 1


if __name__ == "__main__":
    # So that the stage under way ends too: it is in a session of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
