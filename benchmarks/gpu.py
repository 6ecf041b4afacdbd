"""Everything that needs a GPU, in one command of at most nine minutes: ``make gpu``.

In order: the tests that need a device; the kernels beside every installed peer; the training step
of gpt2-124m and llama-1b, profiled; nanoGPT's and nanochat's shapes beside ours where
``NANOGPT_DIR`` and ``NANOCHAT_DIR`` name checkouts; a short run of configs/base.toml. Each stage is
a process with its own time limit, so that one that fails or hangs does not cost the others theirs.
A stage may use what those before it left over, never what is kept for those after it.

Figures are written as they come, to ``benchmarks/results/<device>/``. Where the environment has
``OUT``, a folder, they stay out of the checkout: ``$OUT/<device>.tar.gz`` holds them with logs and
traces and is renewed after each stage. Without a CUDA device every stage runs its code at small
shapes on the CPU, as a rehearsal; nothing is kept of it.
"""

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.store import ENV, RESULTS, ROOT, folder_of, read_all

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
NOT_THERE = re.compile(r"skipif\(\s*torch\.cuda\.is_available\(\)")
BASE_RUN = ("train.steps=400", "eval.every_steps=200", "checkpoint.every_steps=none")
TINY_KERNELS = "not 50304 and not 50257 and not 124M and not muon_step and not memory"
TINY_RUN = (
    *("run.compile=off", "train.steps=2", "eval.every_steps=none", "eval.prompts=[]"),
    *("eval.sample_every_steps=none", "schedule.warmup_steps=0", "eval.batch_size=512"),
    *("model.dim=32", "model.n_heads=1", "data.seq_len=16", "train.micro_batch=2"),
    *("model.bigram_vocab_size=none", "train.tokens_per_step=32"),
)


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
    files = (f for f in (ROOT / "tests").rglob("test_*.py") if "test_benchmarks" not in f.name)
    texts = {f.relative_to(ROOT).as_posix(): f.read_text("utf-8") for f in sorted(files)}
    return [
        name
        for name, text in texts.items()
        if NEEDS_DEVICE.search(text) and not NOT_THERE.search(text)
    ]


def missing(*modules: str) -> str:
    """Return which of the packages a stage needs are not installed, as a reason; or nothing."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(absent)}" if absent else ""


def fp8_obstacle() -> str:
    """Return why the trainer cannot multiply in fp8 here, or nothing."""
    import torch

    from fasttrain.model.runtime import HOPPER

    if torch.cuda.is_available() and torch.cuda.get_device_capability() < HOPPER:
        return f"needs a GPU of compute capability {HOPPER[0]}.{HOPPER[1]} or newer"
    return missing("torchao")


def plan(results: Path, work: Path, environment: Mapping[str, str], *, cuda: bool) -> list[Stage]:
    """Return the stages; without a device everything is small.

    ``results`` is the folder of all devices, and ``work`` that for logs and traces.
    """
    python = (sys.executable, "-m")
    pytest = (*python, "pytest", "-q", "-p", "no:cacheprovider")
    out = ("--results", str(results))
    stages: list[Stage] = []

    def add(name: str, *command: str, **limits: Any) -> None:
        stages.append(Stage(name=name, command=command, **limits))

    def bench(
        name: str, file: str, suite: str, *more: str, skipped: str = "", **limits: float
    ) -> None:
        options = ("--benchmark-only", *out, "--suite", suite)
        options = options if cuda else (*options, "--rehearse", *more)
        skipped = skipped or missing(*BENCH_PACKAGES)
        add(name, *pytest, f"benchmarks/bench_{file}.py", *options, skipped=skipped, **limits)

    step = (*python, "benchmarks.gpu_step")
    add("ceilings", *step, "device", *out, limit_s=40, least_s=20)
    workers = str(min(8, os.cpu_count() or 1))
    tests = ("-n", workers, "--timeout=90", "--maxfail=25") if cuda else ("-n0", "--collect-only")
    add("tests", *pytest, *tests, *device_tests(), limit_s=100, least_s=60,
        skipped=missing(*TEST_PACKAGES))  # fmt: skip
    for suite, least_s in KERNELS.items():
        bench(f"kernel {suite}", "ops", suite, "-k", TINY_KERNELS, limit_s=60, least_s=least_s)
    for config, dtype, override, least_s, obstacle in (
        ("gpt2-124m", "bf16", "run.dtype=bf16", 60, ""),
        ("llama-1b", "bf16", "run.dtype=bf16", 60, ""),
        ("llama-1b", "fp8", "run.fp8=true", 40, fp8_obstacle()),
    ):
        command = (*step, f"configs/{config}.toml", override, "--name", f"{config} {dtype}")
        add(f"step {config} {dtype}", *command, *out, "--traces", str(work),
            limit_s=110, least_s=least_s, skipped=obstacle)  # fmt: skip
    for peer, variable in (("nanogpt", "NANOGPT_DIR"), ("nanochat", "NANOCHAT_DIR")):
        why = "" if environment.get(variable) else f"{variable} names no checkout"
        bench(f"peer {peer}", "step", f"step-{peer}", skipped=why, limit_s=90, least_s=35)
    overrides = BASE_RUN if cuda else TINY_RUN
    add("run base.toml", *python, "benchmarks.base_run", *overrides, *out,
        limit_s=150, least_s=45, skipped=missing(*TRAINER_PACKAGES))  # fmt: skip
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


def _bundle(name: str, out: Path, folders: Mapping[str, Path]) -> None:
    """Pack the folders into one archive, replaced in one piece."""
    partial = out / f"{name}.partial"
    with tarfile.open(partial, "w:gz") as archive:
        for label, folder in folders.items():
            archive.add(folder, f"{name}/{label}")
    os.replace(partial, out / f"{name}.tar.gz")


def run_all(
    stages: Sequence[Stage], work: Path, budget_s: float, after: Callable[[], None]
) -> bool:
    """Run the stages in order, a line for each; return whether all that ran went well.

    ``work`` is for the logs, and ``summary.txt``, which grows as stages end.
    """
    started = time.monotonic()
    well = True
    summary = work / "summary.txt"
    summary.write_text("", "utf-8")
    for i, stage in enumerate(stages):
        begun = time.monotonic()
        log = work / f"{re.sub(r'[^a-z0-9]+', '-', stage.name)}.log"
        limit_s = allowance(stages, i, budget_s - (begun - started) - 2 * GRACE_S)
        if stage.skipped:
            outcome = f"left out: {stage.skipped}"
        else:
            outcome = run_stage(stage, limit_s, log) if limit_s > 1 else "no time left"
        lines = [f"{stage.name:28} {time.monotonic() - begun:5.0f} s  {outcome}"]
        if not stage.skipped and outcome != "ok":
            well = False
            text = log.read_text("utf-8", errors="replace") if log.exists() else ""
            last = [line for line in text.splitlines() if line.strip()][-12:]
            lines += [f"    {line[:200]}" for line in last]
        print(*lines, sep="\n", flush=True)
        with summary.open("a", encoding="utf-8") as file:
            file.write("\n".join([*lines, ""]))
        after()
    return well


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything; return 0 where no stage failed."""
    parser = argparse.ArgumentParser(description="Tests and benchmarks on a GPU, in nine minutes.")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for all stages")
    parser.add_argument("--only", default="", help="run the stages whose name has this in it")
    arguments = parser.parse_args(argv)
    from benchmarks import harness, report  # torch: seconds that --help need not take

    started = time.monotonic()
    machine = harness.machine()
    cuda, name = machine["kind"] == "cuda", folder_of(machine)
    out = os.environ.get("OUT")
    with tempfile.TemporaryDirectory(prefix="fasttrain-gpu-") as temporary:
        work = Path(temporary) / "logs"
        work.mkdir()
        results = RESULTS if cuda and not out else Path(temporary) / "results"
        folder = results / name
        folder.mkdir(parents=True, exist_ok=True)
        if cuda:
            print(f"{machine['device']}, torch {machine['torch']}; figures go to {out or folder}")
        else:
            print("no CUDA device: rehearsal at small shapes on the CPU; no figure is kept")
            # Threads that wait for each other on a busy machine take minutes for milliseconds.
            os.environ["OMP_NUM_THREADS"] = "1"
        hurry = 1 if cuda else UNHURRIED
        stages = [
            replace(stage, limit_s=hurry * stage.limit_s)
            for stage in plan(results, work, os.environ, cuda=cuda)
            if arguments.only in stage.name
        ]

        def keep() -> None:
            if out and cuda:
                _bundle(name, Path(out), {"results": folder, "logs": work})
                shutil.copyfile(work / "summary.txt", Path(out) / "summary.txt")

        budget_s = arguments.budget_s * hurry
        well = run_all(stages, work, budget_s - (time.monotonic() - started), keep)
        if cuda:
            documents = [d for d in read_all(results) if folder_of(d["machine"]) == name]
            text = report.plain_text(documents)
            with (work / "summary.txt").open("a", encoding="utf-8") as file:
                file.write(text)
            print(text)
            keep()
    spent = time.monotonic() - started
    print(f"{'done' if well else 'with failures'} after {spent:.0f} s")
    return 0 if well else 1


if __name__ == "__main__":
    # So that the stage under way ends too: it is in a session of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
