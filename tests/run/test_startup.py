"""What start-up costs: which modules are loaded when, and that compiled code is found again."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fasttrain.command import command, usable_cores
from fasttrain.device import set_threads
from fasttrain.model.compiled import compile_cache_use, keep_compiled
from fasttrain.model.runtime import compile_function
from tests.support.toy import ENV

COMPILER = ("torch._dynamo", "torch._inductor", "sympy")


def modules_after(code: str) -> list[set[str]]:
    """Return what a fresh process has loaded after ``code``, and before where that prints it."""
    script = f"import sys\n{code}\nprint(*sys.modules)"
    shown = subprocess.check_output([sys.executable, "-c", script], env=ENV, text=True)
    return [set(line.split()) for line in shown.splitlines()]


def test_a_run_that_compiles_nothing_is_loaded_and_trains_without_the_compiler() -> None:
    """The compiler takes 1.5 s to import, and what only some runs need comes when they do."""
    code = """
import fasttrain.run.run
from fasttrain.command import command, usable_cores
from fasttrain.device import set_threads
from fasttrain.model.compiled import compile_cache_use
assert compile_cache_use() is None
print(*sys.modules)
import torch
from fasttrain_kernels import FusedAdamW, Muon
from fasttrain_kernels._torch import spare_compiler
spare_compiler()
p = torch.ones(3, 3, requires_grad=True)
for kind in (FusedAdamW, Muon):
    optimizer = kind([p], lr=0.1)
    p.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
assert p.grad is None and p[0, 0] < 1
"""
    loaded, trained = modules_after(code)
    assert "fasttrain.engine.loop" in loaded
    others = {"tensorboard", "wandb", "pyarrow", "transformers", "plotly"}
    ours = {f"fasttrain.{name}" for name in ("preflight", "prepare", "engine.memory", "report")}
    assert not loaded & (others | ours | set(COMPILER))
    assert not trained & {"torch._dynamo", "torch._inductor"}


def test_a_config_is_read_without_torch() -> None:
    (loaded,) = modules_after("import fasttrain.train, fasttrain.preflight, fasttrain.config")
    assert not loaded & {"torch", "numpy", "rich", "tokenizers"}


def test_the_command_lists_its_commands_without_the_config() -> None:
    (loaded,) = modules_after("import fasttrain.__main__")
    assert not loaded & {"torch", "argparse", "fasttrain.config"}


def test_compiled_code_is_kept_where_it_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))  # not to be left set
    kept = []
    for capability in ("AVX2", "AVX512"):  # of one, code found by the other computes wrongly
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        keep_compiled(tmp_path)
        kept.append(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
        assert kept[-1].parent == tmp_path
    assert kept[0] != kept[1]
    keep_compiled(tmp_path / "other")  # what is set stands
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(kept[1])


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@pytest.mark.usefixtures("_fresh_compiler")
def test_the_second_compilation_comes_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert compile_cache_use() is None

    def f(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() * 3).sum()

    x = torch.linspace(0, 1, 100)
    first = compile_function(f, "default")(x)
    assert compile_cache_use() == "cold"
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(compile_function(f, "default")(x), first)
    assert compile_cache_use() == "warm"
    assert any(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_leave_the_cores_to_others_unless_told(given, spins, monkeypatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    seen: list[str | None] = []

    @command
    def main() -> int:
        seen.append(os.environ.get("GOMP_SPINCOUNT"))
        return 0

    assert main() == 0
    assert seen == [spins]


V1 = ("4:cpu,cpuacct:/job/7\n0::/", "cpu/job/cpu.cfs_quota_us", "cpu/job/cpu.cfs_period_us")
V2 = ("0::/job/7", "job/cpu.max")


@pytest.mark.parametrize(
    ("groups", "texts", "expected"),
    [
        (V2, ["150000 100000"], 2),  # of 1.5 cores neither is idle
        (V2, ["50000 100000"], 1),
        (V2, ["max 100000"], 64),
        (V2, ["9900000 100000"], 64),
        (V1, ["300000", "100000"], 3),
        (V1, ["-1", "100000"], 64),
        (("4:memory:/job",), [], 64),
        ((), [], 64),  # no control groups, as on macOS
    ],
)
def test_threads_are_as_many_as_the_quota_of_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: tuple[str, ...], texts: list[str],
    expected: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    for name, text in zip(groups[1:], texts, strict=True):
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    if groups:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(f"{groups[0]}\n")
    assert usable_cores(tmp_path) == expected


@pytest.mark.parametrize(
    ("asked", "n_cores", "variable", "expected"),
    [(None, 3, None, 3), (None, 64, None, 8), (5, 3, None, 5), (None, 3, "8", 8)],
)
def test_set_threads(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, n_cores: int, variable: str | None,
    expected: int,
) -> None:  # fmt: skip
    now = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[-1])
    monkeypatch.setattr(torch, "set_num_threads", now.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    set_threads(asked, n_cores)
    assert now[-1] == expected
