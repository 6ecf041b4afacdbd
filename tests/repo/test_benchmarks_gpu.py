"""``make gpu``: its stages fit the time, fail alone, and its parts run up to the device."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import bench_step, bench_trainers, gpu, harness
from benchmarks.gpu import BUDGET_S, Stage, allowance, plan, run_all, run_stage
from fasttrain.config import load_config
from tests.support.toy import alive, wait_until


def stage(code: str, *, limit_s: float = 300.0, least_s: float = 0.0, name: str = "a") -> Stage:
    command = (sys.executable, "-c", code)
    return Stage(name, command, limit_s, least_s)


@pytest.mark.parametrize("cuda", [True, False])
def test_all_stages_fit_nine_minutes(tmp_path: Path, cuda: bool) -> None:
    stages = plan(tmp_path, cuda=cuda)
    assert BUDGET_S <= 9 * 60
    assert sum(s.least_s for s in stages) <= BUDGET_S - 20  # the start and the last kill
    assert all(s.least_s <= s.limit_s for s in stages)
    names = {s.name for s in stages}
    assert {
        "tests",
        "kernel cross_entropy",
        "step llama-1b bf16",
        "trainers",
        "run base.toml",
    } <= names


@pytest.mark.parametrize("overrides", [bench_trainers.SHORT, bench_trainers.TINY_RUN])
def test_what_a_run_of_base_toml_is_given_fits_it(overrides: tuple[str, ...]) -> None:
    path = Path(gpu.__file__).parent.parent / "configs" / "base.toml"
    assert load_config(path, [*overrides]).train.steps in (2, 400)


def test_a_stage_may_use_what_was_left_over_but_not_what_is_kept() -> None:
    stages = [stage("", limit_s=100, least_s=10), stage("", limit_s=50, least_s=40)]
    assert allowance(stages, 0, 540) == 100
    assert allowance(stages, 0, 90) == 50
    assert allowance(stages, 0, 30) == 0
    assert allowance(stages, 1, 45) == 45


def test_a_stage_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"""
import os, pathlib, subprocess
child = subprocess.Popen(["sleep", "600"])
pathlib.Path("{pid}.new").write_text(str(child.pid))
os.rename("{pid}.new", "{pid}")
child.wait()
"""
    limit_s = 1.0
    while not pid.exists():  # a busy machine may not come to start the child so soon
        assert run_stage(stage(code), limit_s, tmp_path / "log").startswith("out of time")
        limit_s *= 4
    wait_until(lambda: not alive(int(pid.read_text())))


def test_a_failure_does_not_stop_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = tmp_path / "done"
    stages = [
        stage("print('why it failed'); raise SystemExit(3)", name="first"),
        stage(f"open({str(done)!r}, 'w').close()", name="third"),
    ]
    assert not run_all(stages, tmp_path, 900.0)
    assert done.exists()
    out = capsys.readouterr().out
    assert out == (tmp_path / "summary.txt").read_text("utf-8")
    assert "failed with exit status 3" in out
    assert "why it failed" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU")
def test_rehearsal_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "plan", lambda *_, **__: [stage("print(1)", name="one")])
    assert gpu.main([]) == 0
    out = capsys.readouterr().out
    assert "no CUDA device: rehearsal" in out
    assert list(tmp_path.iterdir()) == []


def test_device_tests_are_files_that_choose_a_device() -> None:
    chosen = gpu.device_tests()
    assert "tests/kernels/test_cross_entropy.py" in chosen
    assert "tests/kernels/test_adamw.py" in chosen
    assert "tests/kernels/test_bytes.py" not in chosen  # counts in the interpreter
    assert "tests/config/test_config.py" not in chosen


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the stage itself runs in full")
def test_step_stage_runs_up_to_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "N_TOKENS", 10_000)
    ceilings = {"copy_gb_per_s": 1.0, "matmul_tflop_per_s": 0.1}
    monkeypatch.setattr(harness, "ceilings", lambda: ceilings)
    entry: dict[str, Any] = {}

    def compare(calls: Any, **_: Any) -> dict[str, float]:
        calls["fasttrain"]()
        return {"fasttrain": 0.5}

    benchmark = SimpleNamespace(extra_info=entry)
    bench_step.test_config(compare, benchmark, True, tmp_path, "llama-1b fp8")
    assert (entry["rows"], entry["seq_len"], entry["precision"]) == (2, 32, "fp32")
    assert entry["mfu_of_datasheet"] is None  # a CPU has none
    assert entry["mfu_of_measured_ceiling"] > 0
    assert entry["launches_per_step"] is None  # none was measured
    assert entry["data_wait_ms"] >= 0


def test_figures_of_a_run_are_those_of_its_last_lines() -> None:
    train = {"step": 20, "tokens_per_s": 5.0, "step_ms": 1.0, "loss": 2.0}
    evals = [{"val_loss": 1.5, "val_bpb": 0.7}]
    entry = bench_trainers.figures_of_run([train | {"step": 10}, train], evals)
    assert (entry["steps"], entry["val_bpb"], entry["loss"]) == (20, 0.7, 2.0)
    assert entry["tokens_per_s"] == {"fasttrain": 5.0}
    assert bench_trainers.figures_of_run([train], [])["val_bpb"] is None
