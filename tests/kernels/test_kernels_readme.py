"""kernels/README.md and docs/kernels-compiled.md: examples run, signatures are real, tests exist.

That the page lists what is compiled is checked in test_aot.py, beside the compilation.
"""

import ast
import copy
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import fasttrain_kernels
import pytest
import torch

from benchmarks import report

ROOT = Path(__file__).parents[2]
README = (ROOT / "kernels/README.md").read_text("utf-8")
COMPILED = (ROOT / "docs/kernels-compiled.md").read_text("utf-8")
EXAMPLE = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
# The examples of the section of that name, by title.
EXAMPLES = dict(
    re.findall(
        r"^### ([^\n]+)\n(?:(?!^###).)*?```python\n(.*?)```", README, re.DOTALL | re.MULTILINE
    )
)


def load(folder: Path) -> dict[str, Any]:
    path = folder / "example.py"
    path.write_text(EXAMPLE, "utf-8")
    return runpy.run_path(str(path))


def test_the_example_is_short_and_uses_four_ops() -> None:
    lines = [line for line in EXAMPLE.splitlines() if line.strip()]
    assert len(lines) <= 30
    used = re.search(r"from fasttrain_kernels import (.*)", EXAMPLE)[1].split(", ")
    assert len(used) >= 4
    assert all(len(re.findall(rf"\b{name}\(", EXAMPLE)) >= 1 for name in used)


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_the_example_trains_and_agrees_with_plain_torch(
    path: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    namespace = load(tmp_path)
    device = request.getfixturevalue("triton_device") if path == "triton" else "cpu"
    torch.manual_seed(0)
    plain = namespace["Model"](dim=16).to(device)
    patched = copy.deepcopy(plain)
    namespace["patch"](patched)
    patched.to(device)
    tokens, targets = torch.randint(131, (2, 2, 8)).to(device).unbind()
    torch.testing.assert_close(patched(tokens, targets), plain(tokens, targets))
    optimizer = fasttrain_kernels.FusedAdamW(patched.parameters(), lr=1e-2)
    losses = [namespace["step"](patched, optimizer, tokens, targets) for _ in range(3)]
    assert losses[-1] < losses[0] - 0.05
    plain.load_state_dict(patched.state_dict())
    torch.testing.assert_close(patched(tokens, targets), plain(tokens, targets))


def test_the_example_trains_with_a_frozen_parameter(tmp_path: Path) -> None:
    namespace = load(tmp_path)
    torch.manual_seed(0)
    model = namespace["Model"](dim=16)
    namespace["patch"](model)
    model.embed.requires_grad_(False)  # its gradient is None
    tokens, targets = torch.randint(131, (2, 2, 8)).unbind()
    optimizer = fasttrain_kernels.FusedAdamW(model.parameters(), lr=1e-2)
    losses = [namespace["step"](model, optimizer, tokens, targets) for _ in range(3)]
    assert losses[-1] < losses[0] - 0.02


def test_there_is_an_example_of_each_way_to_use_the_kernels() -> None:
    expected = {"Autocast", "GradScaler", "torch.compile", "DDP", "A vendored copy"}
    assert set(EXAMPLES) == expected


@pytest.mark.parametrize("title", ["Autocast", "GradScaler", "torch.compile"])
def test_an_example_trains(title: str, tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(EXAMPLES[title], "utf-8")
    names = runpy.run_path(str(path))
    assert torch.isfinite(names["loss"])
    with_gradient = [p.grad for p in gradients_of(names) if p.grad is not None]
    assert with_gradient or "optimizer" in names


def gradients_of(names: dict[str, Any]) -> list[torch.nn.Parameter]:
    modules = [value for value in names.values() if isinstance(value, torch.nn.Module)]
    return [p for module in modules for p in module.parameters()]


def run_example(title: str, folder: Path, *command: str) -> str:
    """Run an example as a program of its own; return what it prints."""
    path = folder / "example.py"
    path.write_text(EXAMPLES[title], "utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, *command, str(path)], cwd=folder, env=env, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_ranks_of_the_ddp_example_have_the_same_gradient(tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    lines = run_example("DDP", tmp_path, *launch).splitlines()
    norms = dict(re.findall(r"rank (\d): gradient norm ([\d.]+)", "\n".join(lines)))
    assert norms.keys() == {"0", "1"}
    assert norms["0"] == norms["1"]
    assert float(norms["0"]) > 0


def test_the_example_of_a_vendored_copy_computes_the_same(tmp_path: Path) -> None:
    run_example("A vendored copy", tmp_path)
    assert (tmp_path / "my_kernels/rms_norm.py").exists()


def test_the_signatures_are_those_of_the_package() -> None:
    found = re.search(report.PART.format("signatures"), README, re.DOTALL)[0]
    assert found == report.signatures(), "run make report"
    listed = dict(re.findall(r"^\| `(\w+)` \| `(.*)` \|$", found, re.MULTILINE))
    public = {n for n in fasttrain_kernels.__all__ if not n.endswith("_reference")}
    assert set(listed) == public - {"GradNorm", "triton_on_cpu"}
    assert listed["rms_norm"].startswith("(x, weight=None, *, eps=1e-06, ")


def test_each_trap_names_tests_that_exist() -> None:
    section = COMPILED.split("## Known pitfalls")[1]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 25
    defined: dict[str, set[str]] = {}
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(\w+)`", row)
        assert named, f"no test guards: {row}"
        for file, test in named:
            if file not in defined:
                tree = ast.parse(next(ROOT.glob(f"tests/*/{file}")).read_text("utf-8"))
                defined[file] = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
            assert test in defined[file], f"{file}::{test}"


def test_nothing_is_claimed_that_was_not_measured() -> None:
    for page in (README, COMPILED):
        assert "Speed on a GPU: not measured." in page
        assert not re.search(r"TB/s|TFLOP|H100|H200", page)
