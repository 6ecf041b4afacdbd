"""The loop: horizons, logging, evaluation, stopping, resuming in the same process."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from fasttrain_kernels.cpu import is_supported

from fasttrain.checkpoint import resolve, verify
from fasttrain.config import UserError, load_config
from tests.support import toy_trainer
from tests.support.toy import OPTIMIZERS, write_config, write_dataset
from tests.support.toy_trainer import build, digest, rows

TRAIN_KEYS = {"step", "tokens", "epoch", "loss", "loss_ema", "lr", "grad_norm", "tokens_per_s"}
TRAIN_KEYS |= {"step_ms", "data_wait_ms", "forward_backward_ms", "optimizer_ms", "mfu"}
TRAIN_KEYS |= {"eval_s", "checkpoint_s", "sample_s", "goodput", "peak_memory_gib"}
TRAIN_KEYS |= {"progress", "left_s", "skipped_steps", "spikes", "rollbacks", "communication_ms"}


def test_fit_logs_what_the_design_names_and_the_loss_falls(toy: Path, tmp_path: Path) -> None:
    config = load_config(toy, ["train.steps=60", "optim.lr=1e-2", "log.every_steps=10"])
    trainer = build(config, tmp_path / "run")
    assert trainer.fit() == "done"
    logged = rows(tmp_path / "run")
    assert [row["step"] for row in logged] == [1, 10, 20, 30, 40, 50, 60]
    assert set(logged[0]) >= TRAIN_KEYS
    assert logged[0]["mfu"] is None  # no CPU is in the table of peaks
    assert logged[0]["first_step_s"] == trainer.state.first_step_s
    assert "first_step_s" not in logged[1]
    assert logged[0]["goodput"] is None
    for row in logged[1:]:
        parts = ("data_wait_ms", "forward_backward_ms", "optimizer_ms")
        assert all(row[part] > 0 for part in parts[1:])
        assert sum(row[part] for part in parts) <= row["step_ms"] * 1.001
        assert 0 < row["goodput"] <= 1
    assert logged[-1]["tokens"] == 60 * 64
    assert logged[-1]["loss"] < logged[0]["loss"] - 1.5
    evaluated = rows(tmp_path / "run", "eval")
    assert [row["step"] for row in evaluated] == [60]
    assert set(evaluated[0]) >= {"step", "val_loss", "val_ppl", "val_bpb", "val_accuracy"}


def test_a_run_says_that_other_processes_use_its_cores(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = iter([None, 0.47, None])
    monkeypatch.setattr("fasttrain.engine.reporter.CoreWatch.look", lambda self: next(shares))
    console, notes = MagicMock(), list[str]()
    console.note = notes.append
    build(load_config(toy, ["train.steps=3", "log.every_steps=100"]), console=console).fit()
    assert not list(shares)  # a look after each step, logged or not
    (note,) = (note for note in notes if "run.threads" in note)
    assert re.search(r"\bcore\b.*\b47%.*run\.threads=1\b", note)


@pytest.mark.parametrize(
    ("horizon", "n_steps"), [("steps=5", 5), ("tokens=200", 4), ("tokens=192", 3), ("epochs=1", 63)]
)
def test_each_horizon_ends_at_its_step(toy: Path, horizon: str, n_steps: int) -> None:
    values = [f"train.{horizon}", "log.every_steps=1000"]
    if not horizon.startswith("steps"):
        values.append("train.steps=none")
    trainer = build(load_config(toy, values))
    trainer.fit()
    assert trainer.state.step == n_steps


def test_an_epoch_ends_with_a_partial_step_that_counts_every_sample_once(toy: Path) -> None:
    values = ["train.steps=none", "train.epochs=1", "train.tokens_per_step=192"]
    trainer = build(load_config(toy, values))
    seen = 0
    compute = trainer.train_step.compute

    def counting(batches: Any, **options: Any) -> Any:
        nonlocal seen
        seen += sum(int((b.targets != -100).sum()) for b in batches)
        return compute(batches, **options)

    trainer.train_step.compute = counting  # type: ignore[method-assign]
    trainer.fit()
    assert trainer.train_step.n_micro == 3
    n_samples = trainer.train_loader.samples_per_epoch
    assert n_samples % 12 != 0  # so that the last step is a partial one
    assert seen == n_samples * 16


def test_R11_a_time_limit_ends_the_run_with_a_checkpoint(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by 50 ms at each look: a step lasts 50 ms."""
    looks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: 0.05 * next(looks))
    monkeypatch.setattr("fasttrain.engine.loop.time", clock)
    values = ["train.steps=none", "train.hours=0.0006", "schedule.name='linear'"]
    trainer = build(load_config(toy, values), tmp_path / "run")
    assert trainer.fit() == "done"
    assert trainer.state.total_steps is not None
    assert trainer.state.step == trainer.state.total_steps == 43
    assert trainer.state.trained_s == pytest.approx(0.0006 * 3600, abs=0.05)
    assert trainer.state.lr < 3e-3  # the schedule knew its end
    trainer.saver.wait()
    folder = tmp_path / "run/checkpoints"
    checkpoint = folder / f"step-{trainer.state.step:08d}"
    verify(checkpoint)
    assert (folder / "latest").read_text().strip() == checkpoint.name
    # The limit holds for the run, not for each of its sessions.
    again = toy_trainer.resume(load_config(toy, values), checkpoint)
    assert again.fit() == "done"
    assert again.state.step == trainer.state.step


def test_a_stopped_run_logs_the_step_that_it_stopped_at(toy: Path, tmp_path: Path) -> None:
    keys = ["log.every_steps=4", "checkpoint.every_steps=6"]
    for at, logged in ((6, [1, 4, 6]), (8, [1, 4, 8])):
        trainer = build(load_config(toy, keys), tmp_path / f"run-{at}")
        trainer.request_stop(at_step=at)
        assert trainer.fit() == "stopped"
        found = rows(tmp_path / f"run-{at}")
        assert [row["step"] for row in found] == logged
        # The average of an uninterrupted run has no loss of a step that it does not log.
        assert (found[-1]["loss_ema"] == found[-2]["loss_ema"]) == (at == 6)


@pytest.mark.parametrize("horizon", ["steps=12", "epochs=0.5", "tokens=800", "hours=0.0006"])
def test_rows_say_how_far_the_run_is_whatever_its_horizon(
    toy: Path, tmp_path: Path, horizon: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: 0.05 * next(looks))
    monkeypatch.setattr("fasttrain.engine.loop.time", clock)  # a step lasts 50 ms
    config = load_config(toy, ["train.steps=none", f"train.{horizon}", "log.every_steps=1"])
    trainer = build(config, tmp_path / "run")
    assert trainer.fit() == "done"
    logged = rows(tmp_path / "run")
    assert len(logged) == trainer.state.step
    parts = [row["progress"] for row in logged]
    assert parts == pytest.approx([n / len(logged) for n in range(1, len(logged) + 1)], abs=0.02)
    assert parts[-1] == 1.0
    left_s = [row["left_s"] for row in logged]
    assert left_s[-1] == 0.0
    assert (left_s[0] is None) == (config.train.hours is None), "hours are known from the first on"
    assert all(seconds >= 0.0 for seconds in left_s[1:])


def losses(run_dir: Path) -> list[tuple[int, str]]:
    return [(row["step"], float(row["loss"]).hex()) for row in rows(run_dir)]


@pytest.mark.parametrize(
    ("optimizer", "asynchronous", "horizon", "key"),
    [
        ("adamw", True, "steps=12", "model.dropout=0.1"),
        ("muon", False, "steps=12", "run.compile=c++"),  # which knows no dropout
        ("muon", False, "steps=12", "model.dropout=0.1"),
        ("adamw", False, "epochs=1.7", "model.dropout=0.1"),
    ],
)
def test_R1_resuming_continues_the_very_same_trajectory(
    tmp_path: Path, optimizer: str, asynchronous: bool, horizon: str, key: str
) -> None:
    write_dataset(tmp_path / "data", n_train=16 * 40)  # an epoch ends with step 5
    values = [f"optim.name={optimizer}", key, "train.tokens_per_step=128"]
    values += ["train.steps=none", f"train.{horizon}", "eval.every_steps=4"]
    toml = write_config(tmp_path)
    config = load_config(toml, values)
    whole = build(config, tmp_path / "whole")
    cpp = key == "run.compile=c++" and is_supported()
    assert whole.train_step.compile_mode == ("c++" if cpp else "off")
    assert whole.train_loader.samples_per_epoch == 5 * whole.state.samples_per_step
    whole.fit()
    last = whole.state.step
    assert last == (12 if horizon == "steps=12" else 9)  # the ninth is a partial step
    values += ["checkpoint.every_steps=1", "checkpoint.keep_last=20"]
    values += [f"checkpoint.asynchronous={str(asynchronous).lower()}"]
    saved = build(load_config(toml, values), tmp_path / "saved")
    saved.fit()
    assert digest(saved) == digest(whole)  # saving changes nothing
    saved.saver.wait()
    for at in (4, 5, 6, last):  # about the end of an epoch, in the middle of one, at the end
        run_dir = tmp_path / f"resumed-{at}"
        checkpoint = tmp_path / f"saved/checkpoints/step-{at:08d}"
        resumed = toy_trainer.resume(config, checkpoint, run_dir)
        assert resumed.state.step == at
        assert resumed.fit() == "done"
        assert digest(resumed) == digest(whole)
        assert losses(run_dir) == [(s, loss) for s, loss in losses(tmp_path / "whole") if s > at]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_R1_several_resumes_in_a_row_end_at_the_same_bits(
    toy: Path, tmp_path: Path, optimizer: str
) -> None:
    """With an average of the parameters, a window of spikes and two micro-batches a step."""
    values = [f"optim.name={optimizer}", "train.ema_decay=0.9", "train.on_spike=skip"]
    values += ["model.dropout=0.1", "train.tokens_per_step=128", "eval.every_steps=4"]
    config = load_config(toy, [*values, "train.steps=9"])
    whole = build(config, tmp_path / "whole")
    assert whole.fit() == "done"
    run_dir = tmp_path / "parts"
    trainer = build(config, run_dir)
    for stop in (1, 2, 6):
        trainer.request_stop(at_step=stop)
        assert trainer.fit() == "stopped"
        trainer.close()
        trainer = toy_trainer.resume(config, resolve(run_dir), run_dir)
        assert trainer.state.step == stop
    assert trainer.fit() == "done"
    assert digest(trainer) == digest(whole)
    assert losses(run_dir) == losses(tmp_path / "whole")


def test_best_is_kept_and_follows_the_lowest_validation_loss(toy: Path, tmp_path: Path) -> None:
    config = load_config(
        toy, ["eval.every_steps=3", "checkpoint.keep_last=1", "optim.lr=1e-2", "train.steps=12"]
    )
    trainer = build(config, tmp_path / "run")
    trainer.fit()
    trainer.saver.wait()
    evaluated = {row["step"]: row["val_loss"] for row in rows(tmp_path / "run", "eval")}
    assert sorted(evaluated) == [3, 6, 9, 12]
    best = min(evaluated, key=lambda step: evaluated[step])
    folder = tmp_path / "run/checkpoints"
    assert (folder / "best").read_text().strip() == f"step-{best:08d}"
    assert (folder / "latest").read_text().strip() == "step-00000012"
    assert {p.name for p in folder.glob("step-*")} == {f"step-{s:08d}" for s in {best, 12}}


def test_a_checkpoint_of_another_model_is_refused(toy: Path, tmp_path: Path) -> None:
    first = build(load_config(toy, ["train.steps=3"]), tmp_path / "run")
    first.fit()
    first.saver.wait()
    other = build(load_config(toy, ["model.dim=64"]))
    with pytest.raises(UserError, match=r"step-00000003: .*\bmodel\b.*\b32\b.*\b64\b"):
        other.saver.load(tmp_path / "run/checkpoints/step-00000003")


def test_the_position_survives_a_change_of_the_batch(toy: Path, tmp_path: Path) -> None:
    first = build(load_config(toy), tmp_path / "run")
    first.request_stop(at_step=4)
    first.fit()
    first.saver.wait()
    position = first.state.position
    assert position == 16
    wider = load_config(toy, ["train.tokens_per_step=128"])
    second = build(wider, tmp_path / "run", position=position)
    second.saver.load(tmp_path / "run/checkpoints/step-00000004")
    second.request_stop(at_step=6)
    second.fit()
    assert second.state.position == 16 + 2 * 8
    assert rows(tmp_path / "run")[-1]["tokens"] == second.state.position * 16


def test_contexts_cut_the_same_windows_into_shorter_rows(toy: Path) -> None:
    overrides = ["train.steps=4", "eval.sample_every_steps=none"]
    trainer = build(load_config(toy, [*overrides, "schedule.context_fractions=[0.25]"]))
    whole = build(load_config(toy, overrides)).train_loader
    seen, loss_fn = [], trainer.train_step.loss_fn

    def keep(tokens: torch.Tensor, targets: torch.Tensor, *inputs: torch.Tensor | None) -> Any:
        seen.append((tokens, targets))
        return loss_fn(tokens, targets, *inputs)

    trainer.train_step.loss_fn = keep
    assert trainer.fit() == "done"
    assert [tuple(tokens.shape) for tokens, _ in seen] == [(16, 4)] * 2 + [(4, 16)] * 2
    for (tokens, targets), batch in zip(seen, whole, strict=False):
        assert torch.equal(tokens.flatten(), batch.tokens.flatten())
        assert torch.equal(targets.flatten(), batch.targets.flatten())
