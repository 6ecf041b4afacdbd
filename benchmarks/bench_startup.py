"""Start-up: how long imports take, and how long it is from ``python`` to the first step.

The first step is that of configs/base.toml as a process of its own, dataset cached and nothing
compiled, up to the line that reports it. Whole processes, each beside an import of torch in turn.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.store import ROOT

ENV = os.environ | {
    "PYTHONPATH": os.pathsep.join(
        [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    ),
    "PYTHONUNBUFFERED": "1",
}


def process(statement: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, "-c", statement], check=True, env=ENV)


def test_import(compare: Any, budget_s: float) -> None:
    """A config is read and refused without torch; the rest adds little to it."""
    statements = {
        "fasttrain": "import fasttrain.run.run",
        "fasttrain_kernels": "import fasttrain_kernels",
        "torch": "import torch",
        "fasttrain.config": "import fasttrain.config",
        "python": "pass",
    }
    calls = {name: process(statement) for name, statement in statements.items()}
    compare(calls, budget_s=3 * budget_s, warmup=1)  # files come into memory


def first_step(folder: Path) -> None:
    """Start a process and wait for its line for step 1."""
    command = [sys.executable, "-m", "fasttrain.train", str(ROOT / "configs/base.toml")]
    command += ["run.compile=off", f"run.out_dir={folder}", "log.every_steps=1"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.split()[:2] == ["step", "1"]:
                return
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    pytest.fail("no step was reported:\n" + "".join(lines))


def test_first_step(compare: Any, benchmark: Any, budget_s: float, tmp_path: Path) -> None:
    first_step(tmp_path)  # makes the dataset where it is not cached
    calls = {"fasttrain": lambda: first_step(tmp_path), "import of torch": process("import torch")}
    median_s = compare(calls, budget_s=3 * budget_s, warmup=0)
    benchmark.extra_info["first_step_s"] = median_s["fasttrain"]
