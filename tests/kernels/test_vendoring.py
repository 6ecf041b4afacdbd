"""The kernels' folder alone, under another name, in a project that has never heard of fasttrain."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

KERNELS = Path(__file__).parents[2] / "kernels/fasttrain_kernels"

PROJECT = """
import sys

import torch

from vendored.ops import (
    FusedAdamW, Muon, RMSNorm, apply_rope, cross_entropy, cross_entropy_reference, grad_norm,
    linear_cross_entropy, relu_squared, rms_norm, rms_norm_reference, swiglu, symmetric_matmul,
)

torch.manual_seed(0)
norm, head = RMSNorm(32), torch.nn.Linear(32, 131, bias=False)
targets = torch.randint(131, (8,))
x = torch.randn(8, 32, requires_grad=True)
hidden = norm(swiglu(x, x) + relu_squared(x))
torch.testing.assert_close(hidden, rms_norm_reference(swiglu(x, x) + relu_squared(x), norm.weight))
logits = head(hidden)
loss = cross_entropy(logits, targets)
torch.testing.assert_close(loss, cross_entropy_reference(logits, targets))
torch.testing.assert_close(linear_cross_entropy(hidden, head.weight, targets), loss)
q, table = torch.randn(1, 4, 2, 8), torch.zeros(4, 4)
torch.testing.assert_close(apply_rope(q, q, torch.ones(4, 4), table)[0], q)
torch.testing.assert_close(symmetric_matmul(q[0]), q[0] @ q[0].mT)
optimizers = FusedAdamW(norm.parameters(), lr=1e-2), Muon(head.parameters(), lr=1e-2)
for step in range(3):
    loss = linear_cross_entropy(norm(swiglu(x, x)), head.weight, targets)
    first = loss if step == 0 else first
    loss.backward()
    assert grad_norm([p.grad for p in (*norm.parameters(), *head.parameters())]).norm > 0
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
assert loss < first, (loss, first)
assert hasattr(torch.ops.vendored_ops, "cross_entropy_forward")
assert not hasattr(torch.ops.fasttrain_kernels, "cross_entropy_forward")
assert not [name for name in sys.modules if name.split(".")[0].startswith("fasttrain")]
print("fine")
"""


# The environment may have fasttrain installed: refuse it by name.
GUARD = """
import runpy, sys

class Refuse:
    @staticmethod
    def find_spec(name, *_):
        if name.split(".")[0] in ("fasttrain", "fasttrain_kernels"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse)
sys.path.insert(0, ".")
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def run(folder: Path, script: str, *, interpret: bool = False) -> str:
    """Run a script in the project's folder, without any path to this checkout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON"))}
    environment.update({"TRITON_INTERPRET": "1"} if interpret else {})
    command = [sys.executable, "-c", GUARD, script]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "vendored").mkdir()
    (folder / "vendored/__init__.py").touch()
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(KERNELS, folder / "vendored/ops", ignore=ignore)
    (folder / "main.py").write_text(PROJECT, "utf-8")
    return folder


OLD = [*map(int, triton.__version__.split(".")[:2])] < [3, 7]


@pytest.mark.parametrize(
    "interpret",
    [
        False,
        pytest.param(True, marks=pytest.mark.skipif(OLD, reason="needs Triton 3.7's interpreter")),
    ],
    ids=["torch", "kernels"],
)
def test_a_copy_runs_without_fasttrain(project: Path, interpret: bool) -> None:
    assert run(project, "main.py", interpret=interpret).endswith("fine\n")


def test_the_guard_refuses_fasttrain(project: Path) -> None:
    (project / "cheat.py").write_text("import fasttrain_kernels", "utf-8")
    with pytest.raises(AssertionError, match="ImportError"):
        run(project, "cheat.py")
