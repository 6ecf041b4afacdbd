"""What of a run is saved beside its tensors, and what becomes of a save that fails."""

import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from fasttrain import checkpoint
from fasttrain.checkpoint import CheckpointError
from fasttrain.config import load_config
from fasttrain.distributed.world import World
from fasttrain.engine import loop
from fasttrain.engine.loop import HOURS_ESTIMATE_AT, TrainingLoop
from fasttrain.engine.state import rng_state
from fasttrain.run.resume import begin_decay
from tests.support import toy_trainer
from tests.support.faults import Faults


def build(toy: Path, *overrides: str) -> TrainingLoop:
    return toy_trainer.build(load_config(toy, overrides), toy.parent / "run")


@pytest.mark.parametrize("loss", [0.0, math.nan, math.inf])
def test_R12_a_validation_loss_that_is_not_finite_hinders_no_save(
    loss: float, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = iter([4.0, loss, 3.0])
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: {"val_loss": next(results)})
    run = build(toy, "eval.every_steps=1", "checkpoint.every_steps=1", "train.steps=3")
    run.reporter.evaluation = lambda *_: None  # type: ignore[assignment, method-assign]
    assert run.fit() == "done"
    assert run.state.val_losses == pytest.approx([4.0, loss, 3.0], nan_ok=True)
    run.close()
    assert run.saver.failed_saves == 0
    path = checkpoint.resolve(toy.parent / "run")
    assert path.name == "step-00000003"
    again = toy_trainer.resume(load_config(toy), path)
    assert again.state.val_losses == [4.0, loss if loss == 0 else math.inf, 3.0]
    assert again.state.best_val_loss == min(loss if loss == 0 else math.inf, 3.0)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_R15_a_state_given_up_is_saved_or_an_error_tells_why_not(
    asynchronous: str, toy: Path
) -> None:
    run = build(toy, f"checkpoint.asynchronous={asynchronous}")

    def full(operation: str) -> None:
        if operation.startswith("write"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    rng = rng_state(run.device)
    with Faults(toy.parent / "run/checkpoints", before=full):
        run.saver.save_once()  # in the background, or at once: it fails
        with pytest.raises(CheckpointError, match=r"No space left.*free"):
            run.saver.save_now(rng)
    run.saver.save_now(rng)
    assert checkpoint.resolve(toy.parent / "run").name == "step-00000000"


def test_R14_ranks_go_back_to_a_checkpoint_that_all_of_them_can_read(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build(toy, "checkpoint.every_steps=1", "train.steps=3")
    run.fit()
    asked: list[str | None] = []

    def other_rank_fails_once(problem: Any) -> list[Any]:
        if isinstance(problem, list):  # the checkpoints there are, which rank 0 says
            return [problem]
        asked.append(problem)
        return [problem, "its disk failed" if len(asked) == 1 else None]

    monkeypatch.setattr(World, "gather", lambda self, value: other_rank_fails_once(value))
    run.state.last_eval, run.state.eval_due = {"val_loss": 1.0}, True  # of step 3
    found = run.saver.go_back(before=4)
    assert found is not None
    assert (found.step, run.state.step) == (2, 2)  # this rank could read that of step 3
    assert (run.state.last_eval, run.state.eval_due) == ({}, False)
    assert asked == ["", ""]


def test_R8_the_watchdog_outlasts_a_save_that_waits_for_others(toy: Path) -> None:
    run = build(toy, "distributed.timeout_s=7", "train.steps=4", "checkpoint.every_steps=2")
    assert run.saver.writer is not None
    assert run.saver.writer._ranks.patience_s == 600.0
    allowed: list[float] = []
    save = run.saver.save

    def saved() -> object:
        allowed.append(run.lockstep.allowed_s)
        return save()

    run.saver.save = saved  # type: ignore[method-assign, assignment]
    run.fit()
    assert allowed == [607.0, 607.0]
    assert run.lockstep.allowed_s == 7.0  # and a step has its own time again
    assert run.lockstep.deadline == math.inf


def test_R24_a_changed_number_of_hours_is_measured_anew(toy: Path) -> None:
    hours = ["train.steps=none", "train.hours=1", "eval.every_steps=none"]
    run = build(toy, *hours)
    run.state.total_steps = 300
    run.saver.save()
    run.close()
    path = checkpoint.resolve(toy.parent / "run")
    for change, expected in (("train.hours=1", 300), ("train.hours=2", None)):
        again = toy_trainer.resume(load_config(toy, [*hours, change]), path)
        assert again.state.total_steps == expected
    again = toy_trainer.resume(load_config(toy, hours), path)
    begin_decay(again.state, again.config, path)
    assert again.state.total_steps is None


def test_R1_an_evaluation_made_up_for_is_not_made_up_for_again(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed() -> bool:
        raise KeyboardInterrupt

    keys = ["train.steps=4", "eval.every_steps=2"]
    run = build(toy, *keys)
    run.request_stop(at_step=2)
    run.fit()
    run.state.eval_due = True  # as where a signal cut the evaluation off
    run.state.val_losses.clear()
    run.saver.save()
    run.close()
    folder = toy.parent / "run"
    for n_made_up in (1, 0):
        config = load_config(toy, keys)
        again = toy_trainer.resume(config, checkpoint.resolve(folder), folder)
        assert again.state.eval_due == bool(n_made_up)
        monkeypatch.setattr(again, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            again.fit()
        again.close()
        assert len(again.state.val_losses) == 1


def test_the_steps_of_an_hour_are_estimated_from_all_that_the_hour_counts(toy: Path) -> None:
    run = build(toy, "train.steps=none", "train.hours=1", "eval.every_steps=none")
    run.state.step, run.state.trained_s = HOURS_ESTIMATE_AT, 20 * HOURS_ESTIMATE_AT
    for _ in range(HOURS_ESTIMATE_AT):
        assert not run._finished()
        assert run.state.total_steps is None
        run.state.account.add_step(20.0, 10.0)  # of 20 s, 10 s waiting for data
    assert not run._finished()
    assert run.state.total_steps == 3600 // 20


def test_R15_ranks_that_give_up_different_steps_save_nothing_and_do_not_wait(toy: Path) -> None:
    run, store = build(toy), HashStore()
    run.state.step, run.state.position, run.state.tokens = 5, 20, 320
    run.saver.world = World(rank=0, size=2, store=store)
    store.set("saves step of 1", "6")
    with pytest.raises(CheckpointError, match=r"rank 1 .*step 6\b.*rank 0 .*step 5\b"):
        run.saver.save_now(rng_state(run.device))
    assert list((toy.parent / "run/checkpoints").iterdir()) == []
    store.set("saves step of 1", "5")
    run.saver.save_now(rng_state(run.device))
    assert checkpoint.resolve(toy.parent / "run").name == "step-00000005"
