"""Everything that needs a GPU, in one command of at most nine minutes: ``make gpu``.

In order: the tests that need a device; the kernels beside every installed peer; the training step
of gpt2-124m and llama-1b, profiled; nanoGPT's and nanochat's shapes beside ours where
``NANOGPT_DIR`` and ``NANOCHAT_DIR`` name checkouts; a short run of configs/base.toml. Each stage is
a process with its own time limit, so that one that fails or hangs does not cost the others theirs.
A stage may use what those before it left over, never what is kept for those after it.

Figures are written as they come, to ``benchmarks/results/<device>/``. Where the environment has
``OUT``, a folder, they go there instead, with logs and a summary. Without a CUDA device
every stage runs its code at small shapes on the CPU, as a rehearsal; nothing is kept of it.
"""

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.store import ENV, RESULTS, ROOT, folder_of, read_all, slug

BUDGET_S = 540.0
UNHURRIED = 3  # times as long for a rehearsal: on a busy CPU an import alone may take a minute
GRACE_S = 5.0  # between asking a stage to end and ending it
# Of each suite of ops the seconds that are kept for it.
KERNELS = {"linear_cross_entropy": 25, "cross_entropy": 25}
KERNELS |= dict.fromkeys(("rms_norm", "adamw", "swiglu", "rope", "muon"), 15)
# What configures pytest for the tests, and what their conftest imports.
TEST_PACKAGES = ("pytest", "xdist", "pytest_timeout", "hypothesis")
BENCH_PACKAGES = ("pytest", "pytest_benchmark")
TRAINER_PACKAGES = ("numpy", "tokenizers", "safetensors", "rich")
# Tests that choose a device; those of the interpreter and the compiler alone do not need one here.
NEEDS_DEVICE = re.compile(r"triton_device|is_available\(\)")
NOT_THERE = re.compile(r"skipif\(\s*torch\.cuda\.is_available\(\)|/test_benchmarks")
TINY_KERNELS = "not 50304 and not 50257 and not 124M and not muon_step and not memory"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One process; ``skipped`` says why there is none."""

    name: str
    command: tuple[str, ...] = ()
    limit_s: float = 0.0  # more would not help it
    least_s: float = 0.0  # kept for it, however long those before it take
    skipped: str = ""


def allowance(stages: Sequence[Stage], index: int, left_s: float) -> float:
    """Return the seconds that a stage may take when ``left_s`` are left for it and all after it."""
    kept = sum(stage.least_s for stage in stages[index + 1 :] if not stage.skipped)
    return max(0.0, min(stages[index].limit_s, left_s - kept))


def device_tests() -> list[str]:
    """Return the test files whose result depends on the device, but for those of this command."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    texts = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in paths}
    found = {name for name, text in texts.items() if NEEDS_DEVICE.search(text)}
    return sorted(name for name in found if not NOT_THERE.search(f"{name}\n{texts[name]}"))


def missing(*modules: str) -> str:
    """Return which of the packages a stage needs are not installed, as a reason; or nothing."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(absent)}" if absent else ""


def plan(results: Path, environment: Mapping[str, str], *, cuda: bool) -> list[Stage]:
    """Return the stages, with ``results`` the folder of all devices; without one all is small."""
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    stages: list[Stage] = []

    def add(name: str, *command: str, **limits: Any) -> None:
        stages.append(Stage(name=name, command=(*pytest, *command), **limits))

    def bench(
        name: str, file: str, suite: str, *tiny: str, skipped: str = "", **limits: Any
    ) -> None:
        small = () if cuda else ("--rehearse", *tiny)
        command = (f"benchmarks/bench_{file}.py", "--benchmark-only", "--results", str(results))
        skipped = skipped or missing(*BENCH_PACKAGES)
        add(name, *command, "--suite", suite, *small, skipped=skipped, **limits)

    workers = str(min(8, os.cpu_count() or 1))
    tests = ("-n", workers, "--timeout=90", "--maxfail=25") if cuda else ("-n0", "--collect-only")
    why = missing(*TEST_PACKAGES)
    add("tests", *tests, *device_tests(), limit_s=100, least_s=60, skipped=why)
    for suite, least_s in KERNELS.items():
        bench(f"kernel {suite}", "ops", suite, "-k", TINY_KERNELS, limit_s=60, least_s=least_s)
    for step, least_s in (("gpt2-124m bf16", 60), ("llama-1b bf16", 60), ("llama-1b fp8", 40)):
        why = missing("torchao") if "fp8" in step else ""
        suite = f"step-{slug(step)}"
        bench(f"step {step}", "step", suite, skipped=why, limit_s=110, least_s=least_s)
    for peer, variable in (("nanogpt", "NANOGPT_DIR"), ("nanochat", "NANOCHAT_DIR")):
        why = "" if environment.get(variable) else f"{variable} names no checkout"
        bench(f"peer {peer}", "step", f"step-{peer}", skipped=why, limit_s=90, least_s=35)
    why = missing(*TRAINER_PACKAGES)
    bench("run base.toml", "trainers", "run-base", limit_s=150, least_s=45, skipped=why)
    return stages


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
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a stage with all its children: asked first, so that pytest can say what it has done."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE_S)
        except (ProcessLookupError, PermissionError):
            return
        except subprocess.TimeoutExpired:
            continue


def run_all(stages: Sequence[Stage], work: Path, budget_s: float) -> bool:
    """Run the stages in order, a line for each; return whether all that ran went well.

    ``work`` is for the logs, and ``summary.txt``, which grows as stages end.
    """
    started, well = time.monotonic(), True
    for i, stage in enumerate(stages):
        begun, outcome = time.monotonic(), f"left out: {stage.skipped}"
        log = work / f"{slug(stage.name)}.log"
        limit_s = allowance(stages, i, budget_s - (begun - started) - 2 * GRACE_S)
        if not stage.skipped:
            outcome = run_stage(stage, limit_s, log) if limit_s > 1 else "no time left"
        lines = [f"{stage.name:28} {time.monotonic() - begun:5.0f} s  {outcome}"]
        if not stage.skipped and outcome != "ok":
            well = False
            text = log.read_text("utf-8", errors="replace") if log.exists() else ""
            last = [line for line in text.splitlines() if line.strip()][-12:]
            lines += [f"    {line[:200]}" for line in last]
        say(work, "\n".join(lines))
    return well


def say(work: Path, text: str) -> None:
    """Print a text, and add it to the summary."""
    print(text, flush=True)
    with (work / "summary.txt").open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything; return 0 where no stage failed."""
    parser = argparse.ArgumentParser(description="Tests and benchmarks on a GPU, in nine minutes.")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for all stages")
    parser.add_argument("--only", default="", help="run the stages whose name has this in it")
    arguments = parser.parse_args(argv)
    from benchmarks import harness, report  # torch: seconds that --help need not take

    started = time.monotonic()
    machine = harness.machine()
    cuda, hurry = machine["kind"] == "cuda", 1
    with tempfile.TemporaryDirectory(prefix="fasttrain-gpu-") as temporary:
        work = results = Path(temporary)
        if cuda:
            out = os.environ.get("OUT")
            work, results = (Path(out), Path(out) / "results") if out else (work, RESULTS)
            print(f"{machine['device']}, torch {machine['torch']}; figures go to {results}")
        else:
            print("no CUDA device: rehearsal at small shapes on the CPU; no figure is kept")
            # Threads that wait for each other on a busy machine take minutes for milliseconds.
            os.environ["OMP_NUM_THREADS"], hurry = "1", UNHURRIED
        stages = [
            replace(stage, limit_s=hurry * stage.limit_s)
            for stage in plan(results, os.environ, cuda=cuda)
            if arguments.only in stage.name
        ]
        budget_s = arguments.budget_s * hurry - (time.monotonic() - started)
        well = run_all(stages, work, budget_s)
        documents = [d for d in read_all(results) if folder_of(d["machine"]) == folder_of(machine)]
        if cuda and documents:
            say(work, report.plain_text(documents))
    print(f"{'done' if well else 'with failures'} after {time.monotonic() - started:.0f} s")
    return 0 if well else 1


if __name__ == "__main__":
    # So that the stage under way ends too: it is in a session of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
