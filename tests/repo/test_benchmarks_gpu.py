"""``make gpu``: its stages fit the time, fail alone, and its parts run up to the device."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_trainers, gpu
from benchmarks.gpu import GRACE_S, Stage, plan, run_all, run_stage
from fasttrain.config import load_config
from tests.support.toy import alive, wait_until


def stage(code: str, *, limit_s: float = 300.0, name: str = "a") -> Stage:
    return Stage(name, (sys.executable, "-c", code), limit_s)


def test_all_stages_fit_nine_minutes(tmp_path: Path) -> None:
    stages = plan(tmp_path, cuda=True)
    assert sum(s.limit_s for s in stages) + 2 * GRACE_S <= 9 * 60 - 10  # the start takes seconds
    names = [s.name for s in stages]
    assert {"tests", "cross_entropy", "run-llama-1b-bf16", "trainers", "run-base"} <= {*names}
    assert [s.name for s in plan(tmp_path, cuda=False)] == names


@pytest.mark.parametrize("name", bench_trainers.RUNS)
def test_what_a_run_is_given_fits_its_config(name: str) -> None:
    path = bench_trainers.CONFIGS / f"{name.removesuffix('.toml').split()[0]}.toml"
    config = load_config(path, [*bench_trainers.RUNS[name]])
    assert (config.train.steps == 40) != name.endswith(".toml")


def test_a_stage_may_use_what_was_left_over_but_not_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, allowed, takes = 0.0, [], iter((10.0, 100.0, 0.0))

    def run(_: Stage, limit_s: float, log: Path) -> str:
        nonlocal now
        allowed.append(limit_s)
        now += min(limit_s, next(takes))
        return "ok"

    monkeypatch.setattr(gpu.time, "monotonic", lambda: now)
    monkeypatch.setattr(gpu, "run_stage", run)
    assert run_all([stage("", limit_s=s) for s in (60, 20, 30)], tmp_path)
    assert allowed == [60, 70, 30]


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
        assert f" {limit_s:.0f} s" in run_stage(stage(code), limit_s, tmp_path / "log")
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
    assert not run_all(stages, tmp_path)
    assert done.exists()
    out = capsys.readouterr().out
    assert (tmp_path / "first.log").read_text("utf-8") == "why it failed\n"
    assert "status 3" in out
    assert "why it failed" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU")
def test_rehearsal_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "plan", lambda *_, **__: [stage("print(1)", name="one")])
    assert gpu.main() == 0
    out = capsys.readouterr().out
    assert re.search("CUDA.*rehearsal", out)
    assert list(tmp_path.iterdir()) == []


def test_device_tests_are_files_that_choose_a_device() -> None:
    chosen = gpu.device_tests()
    assert "tests/kernels/test_cross_entropy.py" in chosen
    assert "tests/kernels/test_adamw.py" in chosen
    assert "tests/kernels/test_bytes.py" not in chosen  # counts in the interpreter
    assert "tests/config/test_config.py" not in chosen


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the stage itself runs in full")
def test_step_stage_runs_up_to_the_device(tmp_path: Path) -> None:
    benchmark = SimpleNamespace(extra_info={}, pedantic=lambda f, args: f(*args))
    bench_trainers.test_run(benchmark, False, True, tmp_path, "llama-1b fp8")
    entry = benchmark.extra_info
    assert entry["steps"] == 2
    assert entry["tokens_per_s"] > 0
    assert entry["mfu"] is None  # a CPU has no datasheet
    assert entry["data_wait_ms"] >= 0


def test_figures_of_a_run_are_those_of_its_last_lines() -> None:
    train = {"step": 20, "tokens_per_s": 5.0, "step_ms": 1.0, "loss": 2.0}
    evals = [{"val_loss": 1.5, "val_bpb": 0.7}]
    entry = bench_trainers.figures_of_run([train | {"step": 10}, train], evals)
    assert (entry["steps"], entry["val_bpb"], entry["loss"]) == (20, 0.7, 2.0)
    assert entry["tokens_per_s"] == 5.0
    assert bench_trainers.figures_of_run([train], [])["val_bpb"] is None
