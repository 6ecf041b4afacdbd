"""Start-up: how long imports take, and how long it is from ``python`` to the first step.

The first step is that of configs/base.toml as a process of its own, dataset cached and nothing
compiled, up to the line that reports it. Whole processes, each beside an import of torch in turn.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import run
from benchmarks.store import ENV, ROOT


def test_import(compare: Any, budget_s: float) -> None:
    """A config is read and refused without torch; the rest adds little to it."""
    modules = ("fasttrain.run.run", "fasttrain_kernels", "torch", "fasttrain.config")
    calls = {name: partial(run, "-c", f"import {name}") for name in modules}
    calls = {"fasttrain": calls.pop(modules[0])} | calls | {"python": partial(run, "-c", "")}
    compare(calls, budget_s=3 * budget_s, warmup=1)  # files come into memory


def first_step(folder: Path) -> None:
    """Start a process and wait for its line for step 1."""
    command = [sys.executable, "-m", "fasttrain.train", str(ROOT / "configs/base.toml")]
    command += ["run.compile=off", f"run.out_dir={folder}", "log.every_steps=1"]
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | ENV, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        for line in process.stdout:
            lines.append(line)
            if line.split()[:2] == ["step", "1"]:
                process.kill()
                return
    pytest.fail("no step was reported:\n" + "".join(lines))


def test_first_step(compare: Any, benchmark: Any, budget_s: float, tmp_path: Path) -> None:
    first_step(tmp_path)  # makes the dataset where it is not cached
    ways = {"fasttrain": partial(first_step, tmp_path)}
    ways["import of torch"] = partial(run, "-c", "import torch")
    median_s = compare(ways, budget_s=3 * budget_s, warmup=0)
    benchmark.extra_info["first_step_s"] = median_s["fasttrain"]
