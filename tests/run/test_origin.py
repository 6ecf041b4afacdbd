"""Runs that start from another: its parameters, or all of it with a learning rate that decays."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from fasttrain import checkpoint
from fasttrain.config import load_config
from fasttrain.generate import load_model
from fasttrain.train import main
from tests.support.toy_trainer import rows

WSD = ["schedule.name=wsd", "schedule.warmup_steps=1", "checkpoint.every_steps=4"]


def train(toy: Path, name: str, *arguments: str, check: int = 0) -> Path:
    assert main([str(toy), f"run.name={name}", *arguments]) == check
    return Path("runs") / name


def test_a_new_run_starts_from_the_parameters_of_another(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(toy, "first", "train.steps=6")
    tiny = "optim.lr=1e-12"  # so that what it ends with is what it started with
    second = train(toy, "second", f"model.init_from={first}", "train.steps=3", tiny)
    ours, theirs = load_model(second).state_dict(), load_model(first).state_dict()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-9)
    state = json.loads((second / "checkpoints/step-00000003/state.json").read_text())
    assert state["step"] == 3
    assert state["position"] == 12  # the data from its beginning
    # The folder it came from is not needed again.
    shutil.rmtree(first)
    train(
        toy, "second", f"model.init_from={first}", "train.steps=5", tiny,
        "--resume", "auto", "--allow-change", "train.steps",
    )  # fmt: skip
    capsys.readouterr()
    train(toy, "third", f"model.init_from={second}", "model.dim=16", check=2)
    error = capsys.readouterr().err
    assert re.search(r"attention\.out\.weight .*\(32, 32\).*\(16, 16\)", error)
    assert not Path("runs/third").exists()
    train(toy, "fourth", "model.init_from=nowhere", check=2)
    assert re.search(r"\bnowhere: .*\bfolder\b", capsys.readouterr().err)


def test_a_branch_decays_from_a_checkpoint_to_its_own_horizon(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = train(toy, "base", *WSD, "train.steps=8", "schedule.decay_fraction=0.125")
    source = base / "checkpoints/step-00000004"
    options = [*WSD, "train.steps=9", "--decay-from", str(source)]
    branch = train(toy, "branch", *options)
    steps = rows(branch)
    assert [row["step"] for row in steps] == [5, 6, 7, 8, 9]
    peak = 3e-3
    assert [row["lr"] for row in steps] == pytest.approx([peak * k / 4 for k in (4, 3, 2, 1, 0)])
    # Until the rates part, the branch is the run: parameters, moments, data.
    assert steps[0]["loss"] == next(row["loss"] for row in rows(base) if row["step"] == 5)
    assert math.isclose(steps[1]["loss"], rows(base)[5]["loss"], rel_tol=1e-6)
    assert load_config(branch / "config.toml").schedule.decay_start_step == 4
    # Stopped and resumed by the config that knows nothing of the branching, it is the same.
    again = train(toy, "again", *options, "--stop-at-step", "6", check=75)
    train(toy, "again", *WSD, "train.steps=9", "--resume", "auto")
    ends = [checkpoint.load(run / "checkpoints/step-00000009") for run in (branch, again)]
    for name, tensor in ends[0].group("model").items():
        assert torch.equal(tensor, ends[1].group("model")[name])
    # A job script repeats its command; the source may have continued meanwhile.
    job = [*WSD, "train.steps=9", "--decay-from", str(base), "--resume", "auto"]
    third = train(toy, "job", *job[:-3], str(source), *job[-2:], "--stop-at-step", "6", check=75)
    train(toy, "job", *job)
    assert [row["loss"] for row in rows(third)] == [row["loss"] for row in rows(again)]
    capsys.readouterr()
    for options, message in (
        (["train.steps=4", *WSD], "train.steps"),
        (["train.steps=9"], "schedule.name=wsd"),
        ([*WSD, "train.steps=9", "model.dim=16"], "model.dim"),
        ([*WSD, "--resume", str(base)], f"--resume {base}"),
    ):
        train(toy, "refused", *options, "--decay-from", str(source), check=2)
        assert message in capsys.readouterr().err
        assert not Path("runs/refused").exists()


def test_averaged_weights_are_evaluated_saved_and_resumed(toy: Path) -> None:
    settings = ["train.ema_decay=0.8", "eval.every_steps=4", "optim.lr=1e-2", "train.steps=8"]
    whole = train(toy, "whole", *settings)
    part = train(toy, "part", *settings, "--stop-at-step", "5", check=75)
    train(toy, "part", *settings, "--resume", "auto")
    ends = [checkpoint.load(run / "checkpoints/step-00000008") for run in (whole, part)]
    for group in ("model", "ema"):
        assert ends[0].group(group)
        for name, tensor in ends[0].group(group).items():
            assert torch.equal(tensor, ends[1].group(group)[name]), name
    averaged = load_model(whole, which="latest").state_dict()
    for name, tensor in ends[0].group("ema").items():
        assert torch.equal(averaged[name], tensor)
        assert not torch.equal(tensor, ends[0].group("model")[name])
    plain = train(toy, "plain", *settings[1:])
    assert rows(plain)[-1]["loss"] == rows(whole)[-1]["loss"]  # averaging changes no step
    assert rows(plain, "eval")[-1]["val_loss"] != rows(whole, "eval")[-1]["val_loss"]


def test_early_stopping_and_plateaus_follow_the_evaluations(toy: Path) -> None:
    evaluations = ["eval.every_steps=1", "train.steps=12", "eval.min_change=100.0"]
    stopped = train(toy, "stopped", *evaluations, "eval.patience=3")
    assert rows(stopped)[-1]["step"] == 4  # the first is the best; three bring no change of 100
    assert (stopped / "checkpoints/step-00000004").is_dir()
    plateau = ["schedule.name=plateau", "schedule.plateau_evals=2", "schedule.warmup_steps=0"]
    plateau += ["schedule.decay_factor=0.5", "schedule.min_lr=1e-3", *evaluations]
    whole = train(toy, "plateau", *plateau)
    # The first is an improvement, after the third there have been two without.
    expected = [3e-3] * 3 + [1.5e-3] * 2 + [1e-3] * 7
    assert [row["lr"] for row in rows(whole)] == pytest.approx(expected)
    train(toy, "part", *plateau, "--stop-at-step", "4", check=75)
    train(toy, "part", *plateau, "--resume", "auto")
    assert [row["lr"] for row in rows(Path("runs/part"))] == pytest.approx(expected)


def test_max_grad_value_bounds_what_the_optimizer_sees(toy: Path) -> None:
    """SGD without momentum moves no element by more than lr · value."""
    sgd = ["optim.name=sgd", "optim.momentum=0.0", "optim.weight_decay=0.0", "optim.lr=1.0"]
    start = train(toy, "start", "train.steps=1", "schedule.warmup_steps=0", "optim.lr=1e-12")
    ends = [f"model.init_from={start}", "train.steps=1", "schedule.warmup_steps=0", *sgd]
    bounded = train(toy, "bounded", *ends, "train.max_grad_value=1e-4", "train.max_grad_norm=none")
    free = train(toy, "free", *ends)
    before = load_model(start).state_dict()

    def largest(run: Path) -> float:
        after = load_model(run).state_dict()
        return max((after[name] - before[name]).abs().max().item() for name in before)

    assert largest(bounded) == pytest.approx(1e-4, rel=1e-2)
    assert largest(free) > 1e-3
