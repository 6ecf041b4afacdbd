"""The command as a user runs it: end to end, bad input, stopping, killing, resuming."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.toy import ROOT, train, write_config


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def losses(run_dir: Path) -> list[tuple[int, str]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    logged = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    return [(row["step"], float(row["loss"]).hex()) for row in logged]


def hashes(checkpoint: Path) -> dict[str, Any]:
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: files[name] for name in ("model.safetensors", "optimizer.safetensors")}


def test_a_run_leaves_what_the_design_names_and_says_how_to_go_on(toy: Path) -> None:
    process = train(toy, "eval.sample_every_steps=6")
    run_dir = toy.parent / "runs/toy"
    for name in ("config.toml", "metrics.jsonl", "train.log", "samples.txt", "tokenizer.json"):
        assert (run_dir / name).stat().st_size > 0, name
    assert (run_dir / "checkpoints/latest").read_text().strip() == "step-00000012"
    out = process.stdout
    assert "\x1b" not in out
    assert "\r" not in out
    assert "python -m fasttrain.generate runs/toy" in out
    assert "bits per byte" in out
    assert process.stderr == ""
    generated = subprocess.run(
        [sys.executable, "-m", "fasttrain.generate", "runs/toy", "--prompt", "alpha"],
        cwd=toy.parent,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert generated.stdout.startswith("alpha")


def test_a_second_run_never_touches_the_first(toy: Path) -> None:
    train(toy, "train.steps=3")
    before = (toy.parent / "runs/toy/metrics.jsonl").read_bytes()
    train(toy, "train.steps=3")
    assert (toy.parent / "runs/toy-2/checkpoints/latest").exists()
    assert (toy.parent / "runs/toy/metrics.jsonl").read_bytes() == before
    refused = train(toy, "run.name=toy", check=2)
    assert "runs/toy exists already; continue it with --resume auto" in refused.stderr
    assert (toy.parent / "runs/toy/metrics.jsonl").read_bytes() == before


def test_stop_and_resume_end_at_the_bits_of_the_uninterrupted_run(toy: Path) -> None:
    train(toy, "run.name=whole")
    stopped = train(toy, "run.name=parts", "--stop-at-step", "5", check=75)
    assert "--resume auto" in stopped.stdout
    resumed = train(toy, "run.name=parts", "--resume", "auto")
    assert "step 5" in resumed.stdout
    whole, parts = (toy.parent / "runs" / name for name in ("whole", "parts"))
    assert losses(whole) == losses(parts)
    last = "checkpoints/step-00000012"
    assert hashes(whole / last) == hashes(parts / last)


def start(toy: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fasttrain.train", str(toy), *arguments],
        cwd=toy.parent,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(run_dir: Path, step: int, timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    path = run_dir / "metrics.jsonl"
    while time.monotonic() < deadline:
        if path.exists() and any(s >= step for s, _ in losses_so_far(path)):
            return
        time.sleep(0.01)
    raise TimeoutError(f"step {step} not reached in {timeout_s} s")


def losses_so_far(path: Path) -> list[tuple[int, str]]:
    found = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # being written
        if row["kind"] == "train":
            found.append((row["step"], row["loss"]))
    return found


def test_kill_and_resume_end_at_the_bits_of_the_uninterrupted_run(toy: Path) -> None:
    long = ["train.steps=300", "checkpoint.every_steps=20", "log.every_steps=1"]
    train(toy, *long, "run.name=whole")
    process = start(toy, *long, "run.name=killed")
    run_dir = toy.parent / "runs/killed"
    wait_for_step(run_dir, 50)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    resumed = train(toy, *long, "run.name=killed", "--resume", "auto")
    assert "resumed" in resumed.stdout
    assert losses(toy.parent / "runs/whole") == losses(run_dir)
    last = "checkpoints/step-00000300"
    assert hashes(toy.parent / "runs/whole" / last) == hashes(run_dir / last)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_R10_a_signal_ends_with_a_checkpoint_and_the_way_to_resume(
    toy: Path, number: signal.Signals
) -> None:
    process = start(toy, "train.steps=1000000", "log.every_steps=10")
    run_dir = toy.parent / "runs/toy"
    wait_for_step(run_dir, 20)
    process.send_signal(number)
    out, err = process.communicate(timeout=25)
    assert process.returncode == 75, out + err
    assert number.name in out
    assert "--resume auto" in out
    assert "Traceback" not in out + err
    latest = (run_dir / "checkpoints/latest").read_text().strip()
    assert (run_dir / "checkpoints" / latest / "manifest.json").exists()


def test_R13_a_second_trainer_on_the_same_folder_is_refused(toy: Path) -> None:
    process = start(toy, "train.steps=1000000", "checkpoint.every_steps=10")
    run_dir = toy.parent / "runs/toy"
    wait_for_step(run_dir, 20)
    refused = train(toy, "train.steps=1000000", "--resume", str(run_dir), check=2)
    assert "in use by another trainer" in refused.stderr
    process.kill()
    process.communicate()


def refusal(toy: Path, *arguments: str) -> str:
    """Return the one line with which the command refuses."""
    process = train(toy, *arguments, check=2)
    assert process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1, process.stderr
    return process.stderr


def test_bad_input_is_one_line_with_the_remedy_and_status_2(toy: Path, tmp_path: Path) -> None:
    assert "nowhere.toml" in refusal(tmp_path / "nowhere.toml")
    message = refusal(toy, "optim.larning_rate=1")
    assert "larning_rate" in message
    message = refusal(toy, "data.path=nowhere")
    assert "nowhere" in message
    assert "prepare" in message
    (tmp_path / "empty").mkdir()
    assert "empty" in refusal(toy, "data.path=empty")
    message = refusal(toy, "data.seq_len=100000")
    assert "data.seq_len" in message
    message = refusal(toy, "model.vocab_size=100")
    assert "vocab" in message
    assert "nothing to resume" in refusal(toy, "--resume", "auto")
    assert "nowhere" in refusal(toy, "--resume", "nowhere")
    if shutil.which("nvidia-smi") is None:
        message = refusal(toy, "run.device=cuda:0")
        assert "run.device" in message
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_a_tokenizer_that_does_not_match_is_refused(toy: Path) -> None:
    tokenizer = toy.parent / "data/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    message = refusal(toy)
    assert "tokenizer.json" in message


def test_an_output_folder_that_cannot_be_written_is_refused(toy: Path) -> None:
    (toy.parent / "file").write_text("")
    message = refusal(toy, "run.out_dir=file")
    assert "run.out_dir" in message


def test_R24_resuming_with_other_settings_is_refused_field_by_field(toy: Path) -> None:
    train(toy, "run.name=a", "--stop-at-step", "4", check=75)
    message = refusal(toy, "run.name=a", "optim.lr=1e-4", "model.dim=64", "--resume", "auto")
    assert "optim.lr" in message
    assert "model.dim" in message
    assert "--allow-change" in message
    allowed = ["--allow-change", "train.steps"]
    train(toy, "run.name=a", "train.steps=14", "--resume", "auto", *allowed)
    assert losses(toy.parent / "runs/a")[-1][0] == 14


def test_help_lists_every_key_without_importing_torch(toy: Path) -> None:
    code = (
        "import sys\nfrom fasttrain.train import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        check=True,
    )
    for key in ("run.device", "model.n_kv_heads", "optim.betas", "checkpoint.keep_last"):
        assert key in process.stdout
