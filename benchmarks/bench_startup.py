"""Start-up: how long imports take, and how long it is from ``python`` to the first step.

The first step is that of configs/base.toml as a process of its own, dataset cached and nothing
compiled, up to the line that reports it. Whole processes, each beside an import of torch in turn.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import measure
from benchmarks.store import ROOT

ENV = os.environ | {
    "PYTHONPATH": os.pathsep.join(
        [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    ),
    "PYTHONUNBUFFERED": "1",
}


def import_s(statement: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, env=ENV)
    return time.perf_counter() - started


def test_import(benchmark: Any, budget_s: float) -> None:
    """A config is read and refused without torch; the rest adds little to it."""
    statements = {
        "python": "pass",
        "fasttrain.config": "import fasttrain.config",
        "torch": "import torch",
        "fasttrain_kernels": "import fasttrain_kernels",
        "fasttrain.train": "import fasttrain.session",
    }
    times: dict[str, list[float]] = {name: [] for name in statements}

    def all_rounds() -> None:
        for _ in measure.rounds_within(3 * budget_s):
            for name, statement in statements.items():
                times[name].append(import_s(statement))

    import_s(statements["fasttrain.train"])  # files come into memory
    benchmark.pedantic(all_rounds)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    benchmark.extra_info["import_s"] = seconds
    benchmark.extra_info["times_s"] = {
        "fasttrain": times["fasttrain.train"], "torch": times["torch"]
    }  # fmt: skip


def first_step_s(folder: Path) -> float:
    """Return the seconds from the start of a process to its line for step 1, and end it there."""
    command = [sys.executable, "-m", "fasttrain.train", str(ROOT / "configs/base.toml")]
    command += ["run.compile=off", f"run.out_dir={folder}", "log.every_steps=1"]
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.split()[:2] == ["step", "1"]:
                return time.perf_counter() - started
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    pytest.fail("no step was reported:\n" + "".join(lines))


def test_first_step(benchmark: Any, budget_s: float, tmp_path: Path) -> None:
    first_step_s(tmp_path)  # makes the dataset where it is not cached
    times: dict[str, list[float]] = {"fasttrain": [], "import of torch": []}

    def all_rounds() -> None:
        for _ in measure.rounds_within(3 * budget_s):
            times["import of torch"].append(import_s("import torch"))
            times["fasttrain"].append(first_step_s(tmp_path))

    benchmark.pedantic(all_rounds)
    benchmark.extra_info["first_step_s"] = statistics.median(times["fasttrain"])
    benchmark.extra_info["times_s"] = times
