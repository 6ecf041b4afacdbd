"""Everything that needs a GPU, in one command of at most nine minutes: ``make gpu``.

In order: the tests that need a device; the kernels beside every installed peer; the training step
of gpt2-124m and llama-1b, profiled; nanoGPT beside ours where ``NANOGPT_DIR`` names a checkout; a
short run of configs/base.toml. Each stage is a process with its own time limit, so that one that
fails or hangs does not cost the others theirs. A stage may use what those before it left over,
never what is kept for those after it.

Figures are written as they come, to ``benchmarks/results/<device>/``. Where the environment has
``OUT``, a folder, they go there instead, with logs and a summary. Without a CUDA device
every stage runs its code at small shapes on the CPU, as a rehearsal; nothing is kept of it.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.store import ENV, RESULTS, ROOT, folder_of, read_all, slug

BUDGET_S = 540.0
UNHURRIED = 3  # times as long for a rehearsal: on a busy CPU an import alone may take a minute
GRACE_S = 5.0  # between asking a stage to end and ending it
# Of each suite of ops the seconds that are kept for it.
KERNELS = {"linear_cross_entropy": 25, "cross_entropy": 25}
KERNELS |= dict.fromkeys(("rms_norm", "adamw", "swiglu", "rope", "muon"), 15)
# Tests that choose a device; those of the interpreter and the compiler alone do not need one here.
NEEDS_DEVICE = re.compile(r"triton_device|is_available\(\)")
NOT_THERE = re.compile(r"skipif\(\s*torch\.cuda\.is_available\(\)|/test_benchmarks")
TINY_KERNELS = "not 50304 and not 50257 and not 124M and not muon_step and not memory"


class Stage(NamedTuple):
    """One process."""

    name: str
    command: tuple[str, ...]
    limit_s: float  # more would not help it
    least_s: float  # kept for it, however long those before it take


def allowance(stages: Sequence[Stage], index: int, left_s: float) -> float:
    """Return the seconds that a stage may take when ``left_s`` are left for it and all after it."""
    kept = sum(stage.least_s for stage in stages[index + 1 :])
    return max(0.0, min(stages[index].limit_s, left_s - kept))


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
    stages = [Stage("tests", (*pytest, *tests, *device_tests()), 100, 60)]

    def bench(name: str, file: str, suite: str, limit_s: float, least_s: float) -> None:
        command = (f"benchmarks/bench_{file}.py", "--benchmark-only", "--results", str(results))
        small = () if cuda else ("--rehearse", *(("-k", TINY_KERNELS) if file == "ops" else ()))
        command = (*pytest, *command, "--suite", suite, *small)
        stages.append(Stage(name, command, limit_s, least_s))

    for suite, least_s in KERNELS.items():
        bench(f"kernel {suite}", "ops", suite, 60, least_s)
    for step, least_s in (("gpt2-124m bf16", 60), ("llama-1b bf16", 60), ("llama-1b fp8", 40)):
        bench(f"step {step}", "step", f"step-{slug(step)}", 110, least_s)
    bench("trainers", "trainers", "trainers", 180, 100)  # where NANOGPT_DIR names a checkout
    bench("run base.toml", "trainers", "run-base", 150, 45)
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
        begun, log = time.monotonic(), work / f"{slug(stage.name)}.log"
        limit_s = allowance(stages, i, budget_s - (begun - started) - 2 * GRACE_S)
        outcome = run_stage(stage, limit_s, log) if limit_s > 1 else "no time left"
        lines = [f"{stage.name:28} {time.monotonic() - begun:5.0f} s  {outcome}"]
        if outcome != "ok":
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
            stage._replace(limit_s=hurry * stage.limit_s)
            for stage in plan(results, cuda=cuda)
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
