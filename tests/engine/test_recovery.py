"""Runs with bad batches: skipped, gone back behind, stopped; the same after a resume."""

import json
import math
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fasttrain.checkpoint import load, resolve
from fasttrain.config import load_config
from fasttrain.engine.faults import MAX_SKIPPED_IN_A_ROW
from fasttrain.engine.loop import TrainingLoop
from fasttrain.log.metrics import NormWatch
from fasttrain.train import main
from tests.support import toy_trainer
from tests.support.toy_trainer import digest, rows, spoil

EVERY_3 = ["checkpoint.every_steps=3", "checkpoint.keep_last=10", "train.steps=14"]


class Screen:
    """A console that keeps its warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def build(toy: Path, *overrides: str, name: str | None = "run") -> TrainingLoop:
    config = load_config(toy, ["model.dropout=0.1", *overrides])
    run_dir = toy.parent / name if name else None
    return toy_trainer.build(config, run_dir, console=Screen())


def resume(toy: Path, checkpoint: Path, *overrides: str) -> TrainingLoop:
    config = load_config(toy, ["model.dropout=0.1", *overrides])
    return toy_trainer.resume(config, checkpoint, checkpoint.parents[1])


def losses(run_dir: Path) -> list[tuple[int, str]]:
    return [(row["step"], float(row["loss"] or math.nan).hex()) for row in rows(run_dir)]


def test_R18_a_bad_batch_is_skipped_counted_and_written_down(toy: Path) -> None:
    trainer = build(toy, "log.every_steps=4")
    spoil(trainer, [1, 6])
    bad = [trainer.train_loader.sample_ids(4 * (step - 1), 4).tolist() for step in (1, 6)]
    assert trainer.fit() == "done"
    logged = {row["step"]: row for row in rows(toy.parent / "run")}
    assert [logged[step]["skipped_steps"] for step in (1, 4, 8, 12)] == [1, 1, 2, 2]
    assert logged[12]["rollbacks"] == logged[12]["spikes"] == 0
    for step, ids in zip((1, 6), bad, strict=True):
        lines = (toy.parent / f"run/faults/step-{step:08d}.jsonl").read_text().splitlines()
        assert [json.loads(line)["sample"] for line in lines] == ids
    assert isinstance(trainer.console, Screen)
    assert len(trainer.console.warnings) == 2
    assert "step 6: nonfinite" in trainer.console.warnings[1]
    assert trainer.state.last_eval["val_loss"]


@pytest.mark.parametrize("kind", ["nonfinite", "spike"])
@pytest.mark.parametrize("log_every", [1, 4])
def test_R18_a_rollback_goes_on_behind_the_bad_batch(toy: Path, kind: str, log_every: int) -> None:
    keys = ["train.on_nonfinite=rollback", f"log.every_steps={log_every}"]
    how = (lambda loss: loss * math.nan) if kind == "nonfinite" else (lambda loss: loss * 100)
    if kind == "spike":
        keys = ["train.on_spike=rollback", "train.spike_window_steps=8", keys[1]]
    trainer = build(toy, *EVERY_3, *keys)
    spoil(trainer, [7, 11], how)
    assert trainer.fit() == "done"
    assert trainer.state.step == 14
    assert trainer.state.position == 4 * 16  # two batches were passed over
    assert trainer.state.faults.rollbacks == 2
    assert [row["step"] for row in rows(toy.parent / "run")] == sorted(
        {1, 14} | set(range(log_every, 15, log_every))
    )
    assert rows(toy.parent / "run")[-1]["rollbacks"] == 2
    # The run is the one that had never seen these batches.
    clean = build(toy, *EVERY_3, *keys, name="clean")
    clean.state.faults.passed_over = [4 * 6, 4 * 11 - 4]
    clean.fit()
    assert digest(trainer) == digest(clean)


def test_R12_a_rollback_on_a_full_disk_goes_on(toy: Path) -> None:
    keys = ["train.on_nonfinite=rollback", "log.csv=true", "checkpoint.asynchronous=false"]
    trainer = build(toy, *EVERY_3, *keys)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def bad_as_the_disk_fills(loss: Tensor) -> Tensor:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        return loss * math.nan

    spoil(trainer, [8], bad_as_the_disk_fills)
    try:
        assert trainer.fit() == "done"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert trainer.state.step == 14
    assert trainer.state.faults.rollbacks == 1
    assert trainer.saver.failed_saves == 3  # of steps 9, 12 and 14
    assert resolve(toy.parent / "run").name == "step-00000006"
    trainer.reporter.close()  # with what waited for space and found room in the buffer
    steps = [row["step"] for row in rows(toy.parent / "run")]
    assert steps == sorted(set(steps))
    assert steps[:6] == [1, 2, 3, 4, 5, 6]


def test_R1_a_run_that_rolled_back_resumes_exactly(toy: Path) -> None:
    keys = [*EVERY_3, "train.on_nonfinite=rollback"]
    whole = build(toy, *keys)
    spoil(whole, [7, 11])
    whole.fit()
    run_dir = toy.parent / "run"
    for at in (6, 9, 12):
        other = toy.parent / f"resumed-{at}"
        shutil.copytree(run_dir, other)
        again = resume(toy, other / f"checkpoints/step-{at:08d}", *keys)
        spoil(again, [7, 11])
        again.fit()
        assert digest(again) == digest(whole)
        assert losses(other) == losses(run_dir)


def test_R18_after_a_stop_in_a_rollback_the_run_does_not_forget_it(toy: Path) -> None:
    keys = [*EVERY_3, "train.on_nonfinite=rollback", "log.every_steps=100"]
    trainer = build(toy, *keys)
    spoil(trainer, [8])
    step = trainer.train_step

    def stopping(*arguments: Any) -> None:
        type(step).update(step, *arguments)
        if trainer.state.step == 7:  # in the bad step, whose verdict nobody has seen
            trainer.request_stop()

    step.update = stopping  # type: ignore[method-assign]
    assert trainer.fit() == "stopped"
    assert trainer.state.step == 6
    trainer.saver.wait()
    again = resume(toy, toy.parent / "run/checkpoints/step-00000006", *keys)
    spoil(again, [8])
    assert again.state.faults.passed_over == [28]
    again.fit()
    assert again.state.faults.rollbacks == 1


def test_R18_a_row_of_bad_steps_goes_back_and_on_behind_them(toy: Path) -> None:
    keys = ["checkpoint.every_steps=10", "checkpoint.keep_last=5", "train.steps=30"]
    trainer = build(toy, *keys)
    spoil(trainer, range(5, 5 + MAX_SKIPPED_IN_A_ROW))
    with pytest.raises(
        FloatingPointError,
        match=r"step 5: nonfinite.*no earlier checkpoint.*checkpoint\.every_steps",
    ):
        trainer.fit()
    trainer = build(toy, *keys, "eval.every_steps=4", name="second")
    spoil(trainer, range(5, 5 + MAX_SKIPPED_IN_A_ROW))
    assert trainer.fit() == "done"
    assert trainer.state.position == 4 * (30 + MAX_SKIPPED_IN_A_ROW)
    assert trainer.state.faults.rollbacks == 1


def test_R18_a_fault_that_comes_back_stops_the_run(toy: Path) -> None:
    trainer = build(toy, *EVERY_3, "train.steps=100", "train.on_nonfinite=rollback")
    spoil(trainer, range(8, 100))
    with pytest.raises(FloatingPointError, match=r"\bcheckpoint 3 times\b") as caught:
        trainer.fit()
    ids = trainer.train_loader.sample_ids(4 * 10, 4)
    assert f" {', '.join(map(str, ids))}" in str(caught.value)
    assert trainer.state.step == 8
    assert trainer.state.faults.passed_over == [28, 32, 36]


def test_R16_a_damaged_checkpoint_is_no_place_to_go_back_to(toy: Path) -> None:
    trainer = build(toy, *EVERY_3, "train.on_nonfinite=rollback", "checkpoint.asynchronous=false")
    spoil(trainer, [8])
    trainer.request_stop(at_step=6)
    trainer.fit()
    file = toy.parent / "run/checkpoints/step-00000006/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    trainer.stop_at = math.inf
    trainer.fit()
    assert isinstance(trainer.console, Screen)
    for told in (
        r"step-00000006/model\.safetensors: .*SHA-256",  # is passed over
        r"\bstep 3\b.*step-00000003\b.*\bstep 8\b",  # is gone back to
    ):
        assert any(re.search(told, warning) for warning in trainer.console.warnings)
    assert trainer.state.step == 14


def test_an_epoch_ends_where_its_samples_do_also_behind_a_bad_batch(toy: Path) -> None:
    keys = ["train.steps=none", "train.epochs=1", "train.on_nonfinite=rollback"]
    trainer = build(toy, *keys, "checkpoint.every_steps=20", "log.every_steps=10")
    spoil(trainer, [33])
    assert trainer.fit() == "done"
    assert trainer.state.total_steps == 63
    assert trainer.state.step == 62


@pytest.mark.parametrize("action", ["skip", "rollback", "stop"])
def test_R18_a_run_that_is_given_up_in_a_step_faces_the_verdicts_before(
    toy: Path, action: str
) -> None:
    trainer = build(toy, *EVERY_3, f"train.on_nonfinite={action}", "log.every_steps=100")
    spoil(trainer, [5])
    trainer.request_stop(at_step=3)
    trainer.fit()
    with trainer.guard.training():
        for _ in range(3):
            trainer._step()
        with trainer.guard.computing():
            if action == "stop":
                with pytest.raises(FloatingPointError, match="step 5: nonfinite"):
                    trainer.save_unfinished()
            else:
                assert trainer.save_unfinished()
            trainer.guard._lock.release()  # a run's process would have ended by now
    last = load(resolve(toy.parent / "run"))
    assert last.step == (6 if action == "skip" else 3)  # from 3 on it meets step 5 again
    assert last.state["faults"]["skipped_steps"] == int(action == "skip")
    assert (toy.parent / "run/faults/step-00000005.jsonl").exists()


def test_what_fails_to_close_leaves_nothing_else_open(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(toy, "log.profile_steps=[2,9]")

    def full() -> None:
        raise OSError("no space left for the log")

    monkeypatch.setattr(trainer.reporter, "close", full)
    with trainer.guard.training():
        trainer._step()
        trainer._step()
    trainer.saver.save()
    with pytest.raises(OSError, match="for the log"):
        trainer.close()
    assert load(resolve(toy.parent / "run")).step == 2  # the save in flight was waited for
    assert (toy.parent / "run/profile/trace.json").stat().st_size  # cut short, and written
    monkeypatch.undo()


def test_an_exploding_gradient_is_warned_of(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NormWatch, "EXPLODED", 0.1)  # so that any norm is one
    trainer = build(toy, "train.steps=22", "log.every_steps=11", name=None)
    assert trainer.fit() == "done"
    (warning,) = trainer.console.warnings  # type: ignore[union-attr]
    assert re.match(r"step 22: .*\bgradient\b.*optim\.lr", warning)


def test_R19_the_same_steps_are_spikes_after_a_resume(toy: Path) -> None:
    keys = ["train.on_spike=skip", "train.spike_window_steps=8", "log.every_steps=2"]
    whole = build(toy, *keys)
    spoil(whole, [10], lambda loss: loss * 100)
    whole.fit()
    assert whole.state.faults.spikes == 1
    parts = build(toy, *keys, name="parts")
    parts.request_stop(at_step=7)
    parts.fit()
    parts.saver.wait()
    again = resume(toy, toy.parent / "parts/checkpoints/step-00000007", *keys)
    spoil(again, [10], lambda loss: loss * 100)
    again.fit()
    assert again.state.faults.spikes == 1  # half of the window came with the checkpoint
    assert digest(again) == digest(whole)


def test_R18_the_command_stops_with_status_1_and_names_the_text(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(toy.parent)
    arguments = ["optim.lr=1e30", "train.max_grad_norm=none", "train.on_nonfinite=stop"]
    assert main([str(toy), *arguments]) == 1
    out = capsys.readouterr().out
    assert "nonfinite" in out
    assert "train.on_nonfinite = 'stop'" in out
    (report,) = (toy.parent / "runs/toy/faults").iterdir()
    line = json.loads(report.read_text("utf-8").splitlines()[0])
    assert set("alphbetgmd \n") & set(line["text"])
    assert report.name in out
