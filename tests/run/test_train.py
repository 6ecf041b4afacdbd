"""The command as a user runs it: end to end, bad input, stopping, killing, resuming.

Most tests call `main` in this process, since a fresh one spends two seconds on importing torch;
signals, kills and exit statuses are seen from outside.
"""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fasttrain.generate import main as generate_main
from fasttrain.run.signals import SIGNALS
from fasttrain.train import main
from tests.support.toy import ENV, ROOT, start, wait_until, write_config


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


Train = Callable[..., Outcome]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_config(tmp_path)


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str]) -> Train:
    """Run the command with a config and arguments in this process; check its exit status."""

    def run(config: Path, *arguments: str, check: int = 0) -> Outcome:
        capsys.readouterr()
        status = main([str(config), *arguments])
        out, err = capsys.readouterr()
        assert status == check, out + err
        return Outcome(status, out, err)

    return run


def losses(run_dir: Path) -> list[tuple[int, str]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    logged = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    return [(row["step"], float(row["loss"]).hex()) for row in logged]


def hashes(checkpoint: Path) -> dict[str, Any]:
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: files[name] for name in ("model.safetensors", "optimizer.safetensors")}


def test_a_run_leaves_what_the_design_names_and_says_how_to_go_on(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["eval.sample_every_steps=6", 'eval.prompts=["abc", "de"]']
    process = start("fasttrain.train", toy, *settings, cwd=toy.parent)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    run_dir = toy.parent / "runs/toy"
    for name in ("config.toml", "metrics.jsonl", "train.log", "samples.txt", "tokenizer.json"):
        assert (run_dir / name).stat().st_size > 0, name
    assert (run_dir / "checkpoints/latest").read_text().strip() == "step-00000012"
    samples = (run_dir / "samples.txt").read_text("utf-8", "replace")
    assert samples.startswith("--- step 6\nde")
    assert "--- step 12\nabc" in samples, "the prompts come in turn"
    assert "\x1b" not in out
    assert "\r" not in out
    assert "python -m fasttrain.generate runs/toy" in out
    assert "bits per byte" in out
    assert err == ""
    assert " CPU, 1 thread · " in out
    assert generate_main([str(run_dir), "--prompt", "alpha", "--greedy"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("alpha")
    assert len(text) > len("alpha")


def test_a_second_run_never_touches_the_first(toy: Path, train: Train) -> None:
    train(toy, "train.steps=3")
    before = (toy.parent / "runs/toy/metrics.jsonl").read_bytes()
    train(toy, "train.steps=3")
    assert (toy.parent / "runs/toy-2/checkpoints/latest").exists()
    assert (toy.parent / "runs/toy/metrics.jsonl").read_bytes() == before
    refused = train(toy, "run.name=toy", check=2)
    assert re.search(r"runs/toy .*--resume auto\b.*run\.name", refused.err)
    assert (toy.parent / "runs/toy/metrics.jsonl").read_bytes() == before


def test_stop_and_resume_end_at_the_bits_of_the_uninterrupted_run(toy: Path, train: Train) -> None:
    train(toy, "run.name=whole")
    stopped = train(toy, "run.name=parts", "--stop-at-step", "5", check=75)
    assert "--resume auto" in stopped.out
    resumed = train(toy, "run.name=parts", "--resume", "auto")
    assert "step 5" in resumed.out
    whole, parts = (toy.parent / "runs" / name for name in ("whole", "parts"))
    assert losses(whole) == losses(parts)
    last = "checkpoints/step-00000012"
    assert hashes(whole / last) == hashes(parts / last)


KILLED = """
import os, signal, sys
from fasttrain.train import main
from tests.support.toy_soak import before_steps
before_steps(lambda step: step == 50 and os.kill(os.getpid(), signal.SIGKILL))
main(sys.argv[1:])
"""


def test_kill_and_resume_end_at_the_bits_of_the_uninterrupted_run(toy: Path, train: Train) -> None:
    long = ["train.steps=60", "checkpoint.every_steps=20", "log.every_steps=1"]
    train(toy, *long, "run.name=whole")
    command = [sys.executable, "-c", KILLED, str(toy), *long, "run.name=killed"]
    assert subprocess.run(command, cwd=toy.parent, env=ENV).returncode == -signal.SIGKILL
    run_dir = toy.parent / "runs/killed"
    resumed = train(toy, *long, "run.name=killed", "--resume", "auto")
    assert "resumed" in resumed.out
    assert losses(toy.parent / "runs/whole") == losses(run_dir)
    last = "checkpoints/step-00000060"
    assert hashes(toy.parent / "runs/whole" / last) == hashes(run_dir / last)


def test_R10_R13_a_run_refuses_a_second_trainer_and_ends_by_a_signal_with_a_checkpoint(
    toy: Path, train: Train
) -> None:
    endless = ("train.steps=1000000", "log.every_steps=10")
    process = start("fasttrain.train", toy, *endless, cwd=toy.parent)
    run_dir = toy.parent / "runs/toy"
    log = run_dir / "metrics.jsonl"
    wait_until(lambda: log.exists() and b'"step": 20,' in log.read_bytes())
    refused = train(toy, "train.steps=1000000", "--resume", str(run_dir), check=2)
    assert re.search(r"runs/toy .*\bin use\b.*run\.name", refused.err)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 75, out + err
    assert "SIGINT" in out
    assert "--resume auto" in out
    assert "Traceback" not in out + err
    latest = (run_dir / "checkpoints/latest").read_text().strip()
    assert (run_dir / "checkpoints" / latest / "manifest.json").exists()


@pytest.fixture
def refusal(train: Train) -> Callable[..., str]:
    """The one line with which the command refuses."""

    def run(config: Path, *arguments: str) -> str:
        line = train(config, *arguments, check=2).err
        assert line.startswith("error: ")
        assert line.count("\n") == 1, line
        assert "Traceback" not in line
        return line

    return run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["optim.larning_rate=1"], ["larning_rate"]),
        (["data.path=nowhere"], ["nowhere", "fasttrain.prepare"]),
        (["data.path=empty"], ["empty"]),
        (["data.seq_len=100000"], ["data.seq_len", "100000"]),
        (["model.vocab_size=100"], ["model.vocab_size", "100"]),
        (["--resume", "nowhere"], ["nowhere"]),
        (["run.device=cuda:97"], ["run.device", "cuda:97"]),
        (["run.out_dir=file"], ["run.out_dir"]),
        (["checkpoint.keep_last=100000000"], ["checkpoint.keep_last", "disk"]),
    ],
    ids=lambda value: value[0] if len(value[0]) > 8 else value[-1],
)
def test_bad_input_is_one_line_with_the_remedy_and_status_2(
    toy: Path, refusal: Callable[..., str], arguments: list[str], expected: list[str]
) -> None:
    (toy.parent / "empty").mkdir()
    (toy.parent / "file").write_text("")
    line = refusal(toy, *arguments)
    for part in expected:
        assert part in line
    runs = toy.parent / "runs"
    assert not runs.exists() or not list(runs.iterdir())


def test_a_missing_config_is_named(toy: Path, refusal: Callable[..., str]) -> None:
    assert "nowhere.toml" in refusal(toy.parent / "nowhere.toml")


def test_a_tokenizer_that_does_not_match_is_refused(toy: Path, refusal: Callable[..., str]) -> None:
    tokenizer = toy.parent / "data/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert "tokenizer.json" in refusal(toy)


def test_R24_resuming_with_other_settings_is_refused_field_by_field(
    toy: Path, train: Train, refusal: Callable[..., str]
) -> None:
    train(toy, "run.name=a", "--stop-at-step", "4", check=75)
    message = refusal(toy, "run.name=a", "optim.lr=1e-4", "model.dim=64", "--resume", "auto")
    assert "optim.lr" in message
    assert "model.dim" in message
    assert "--allow-change" in message
    allowed = ["--allow-change", "train.steps"]
    train(toy, "run.name=a", "train.steps=14", "--resume", "auto", *allowed)
    assert losses(toy.parent / "runs/a")[-1][0] == 14


def test_resuming_finds_the_run_from_any_of_its_folders(toy: Path, train: Train) -> None:
    train(toy, "run.name=a", "--stop-at-step", "4", check=75)
    sources = ("runs/a", "runs/a/checkpoints", "runs/a/checkpoints/step-00000006")
    for stop, source in enumerate(sources, start=5):
        train(toy, "run.name=a", "--resume", source, "--stop-at-step", str(stop), check=75)
        assert losses(toy.parent / "runs/a")[-1][0] == stop
    assert [p.name for p in (toy.parent / "runs").iterdir()] == ["a"]


def test_a_run_is_resumed_with_the_config_that_it_holds(
    toy: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    train(toy, "run.name=whole")
    train(toy, "--stop-at-step", "4", check=75)
    toy.rename(toy.parent / "elsewhere.toml")
    assert main(["--resume", "runs/toy", "--stop-at-step", "6"]) == 75
    assert main(["log.every_steps=2", "--resume", "runs/toy/checkpoints/step-00000006"]) == 0
    assert [p.name for p in sorted((toy.parent / "runs").iterdir())] == ["toy", "whole"]
    assert [step for step, _ in losses(toy.parent / "runs/toy")][-2:] == [10, 12]
    whole, parts = (
        toy.parent / f"runs/{name}/checkpoints/step-00000012" for name in ("whole", "toy")
    )
    assert hashes(whole) == hashes(parts)
    assert main(["--resume", "nowhere"]) == 2
    assert re.search(r"error: --resume nowhere: .*checkpoint", capsys.readouterr().err)


def test_too_little_memory_is_one_message_with_the_remedy(
    toy: Path, monkeypatch: pytest.MonkeyPatch, train: Train
) -> None:
    def full(*_: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("fasttrain.engine.step.TrainStep.compute", full)
    err = train(toy, check=1).err
    told = r"error: CUDA out of memory\. Tried to allocate 2\.00 GiB\.\n.*train\.micro_batch"
    assert re.search(rf"{told}.*train\.activation_checkpointing=full", err)
    assert "Traceback" not in err


def test_an_interruption_before_the_first_step_leaves_nothing(
    toy: Path, monkeypatch: pytest.MonkeyPatch, train: Train
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fasttrain.run.setup.open_splits", interrupted)
    assert re.search("interrupted.*nothing", train(toy, check=130).err)
    assert not list((toy.parent / "runs").iterdir())


@pytest.mark.parametrize("number", SIGNALS)
def test_R10_a_signal_before_or_during_the_imports_ends_at_once(
    number: signal.Signals, toy: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """With status 75 where a checkpoint can be resumed, else with that of the signal."""

    class Finder:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "fasttrain.run.run":
                signal.raise_signal(number)

    def before(*_: object) -> None:
        signal.raise_signal(number)

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr("os._exit", leave)
    handler = signal.getsignal(number)

    def status(*arguments: str) -> object:
        with pytest.raises(SystemExit) as left:
            main([str(toy), *arguments])
        assert signal.getsignal(number) == handler
        return left.value.code

    def statuses(where: tuple[object, str, object]) -> list[object]:
        with monkeypatch.context() as patched:
            patched.delitem(sys.modules, "fasttrain.run.run", raising=False)
            patched.setattr(*where)
            return [status(), status("--resume", "auto"), status("--resume", "runs/toy")]

    importing = (sys, "meta_path", [Finder, *sys.meta_path])
    (toy.parent / "runs/toy/checkpoints").mkdir(parents=True)
    by_signal, saved = 128 + number, 75
    assert statuses(importing) == [by_signal, by_signal, saved]
    new, auto, named = capsys.readouterr().err.splitlines()
    assert new == auto != named
    (toy.parent / "runs/toy/checkpoints/step-00000002").mkdir()
    assert statuses(importing) == [by_signal, saved, saved]
    assert capsys.readouterr().err.splitlines() == [new, named, named]
    assert statuses((sys.modules["fasttrain.train"], "load_config", before))[-1] == saved


def test_R10_a_process_that_is_stopped_while_it_imports(toy: Path) -> None:
    (toy.parent / "runs/toy/checkpoints/step-00000002").mkdir(parents=True)
    waits = "import os, time\nopen(f'importing-{os.getpid()}', 'w').close()\ntime.sleep(600)\n"
    (toy.parent / "rich.py").write_text(waits)
    started = {
        number: start("fasttrain.train", toy, "--resume", "auto", cwd=toy.parent)
        for number in (signal.SIGTERM, signal.SIGUSR1)
    }
    for number, process in started.items():
        importing = toy.parent / f"importing-{process.pid}"
        while not importing.exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 75, out + err
        assert re.fullmatch("interrupted.*resume.*\n", err)
    assert not (toy.parent / "runs/toy/train.log").exists()


def test_a_command_line_of_another_kind_is_told_how_it_is_written(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, remedy in (
        ([], r"configs/base\.toml"),
        (["--resume", "auto"], r"configs/base\.toml"),
        (["train.steps=3"], r"configs/base\.toml"),
        ([str(toy), "--optim.lr=1"], r"--optim\.lr=1\b.* optim\.lr=VALUE"),
        ([str(toy), "--steps", "100"], r"--steps 100\b.* train\.steps="),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert re.search(f"error: .*{remedy}", capsys.readouterr().err)


def test_help_lists_every_key_without_importing_torch() -> None:
    code = (
        "import sys\nfrom fasttrain.train import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
        check=True,
    )
    for key in ("n_kv_heads", "betas", "keep_last", "[run]"):
        assert key in process.stdout
