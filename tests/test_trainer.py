"""The loop: horizons, logging, evaluation, stopping, resuming in the same process."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fasttrain.config import TrainConfig, load_config
from fasttrain.data.format import open_dataset
from fasttrain.data.loader import Loader
from fasttrain.faults import MAX_SKIPPED_IN_A_ROW
from fasttrain.model import Transformer
from fasttrain.optim import build_optimizers
from fasttrain.trainer import Trainer
from tests.toy import write_config

_open: list[Trainer] = []


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    while _open:
        _open.pop().close()


def build(config: TrainConfig, run_dir: Path | None = None, position: int = 0) -> Trainer:
    assert config.data.path is not None
    train, val = (open_dataset(config.data.path, split) for split in ("train", "val"))
    torch.manual_seed(config.run.seed)
    model_config = replace(config.model, vocab_size=train.vocab_size)
    model = Transformer(model_config, seq_len=config.data.seq_len)
    samples = (train.n_tokens - 1) // config.data.seq_len
    epochs = config.train.epochs
    if run_dir is not None:
        run_dir.mkdir(exist_ok=True)
    trainer = Trainer(
        model,
        build_optimizers(model, config.optim),
        None,
        None,
        config,
        train_loader=Loader(
            train,
            seq_len=config.data.seq_len,
            micro_batch=config.train.micro_batch,
            seed=config.run.seed,
            device="cpu",
            position=position,
            end=None if epochs is None else math.ceil(epochs * samples),
        ),
        val_dataset=val,
        run_dir=run_dir,
    )
    _open.append(trainer)
    return trainer


def rows(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_config(tmp_path)


TRAIN_KEYS = {"step", "tokens", "epoch", "loss", "loss_ema", "lr", "grad_norm", "tokens_per_s"}
TRAIN_KEYS |= {"step_ms", "data_wait_ms", "mfu", "peak_memory_gib"}


def test_fit_logs_what_the_design_names_and_the_loss_falls(toy: Path, tmp_path: Path) -> None:
    config = load_config(toy, ["train.steps=60", "optim.lr=1e-2", "log.every_steps=10"])
    trainer = build(config, tmp_path / "run")
    assert trainer.fit() == "done"
    logged = rows(tmp_path / "run")
    assert [row["step"] for row in logged] == [1, 10, 20, 30, 40, 50, 60]
    assert set(logged[0]) >= TRAIN_KEYS
    assert logged[0]["mfu"] is None  # no CPU is in the table of peaks
    assert logged[-1]["tokens"] == 60 * 64
    assert logged[-1]["loss"] < logged[0]["loss"] - 1.5
    evaluated = rows(tmp_path / "run", "eval")
    assert [row["step"] for row in evaluated] == [60]
    assert set(evaluated[0]) >= {"step", "val_loss", "val_ppl", "val_bpb", "val_accuracy"}


def test_evaluation_covers_the_split_once_whatever_its_batches(toy: Path) -> None:
    trainer = build(load_config(toy))
    row = trainer.evaluate()
    assert trainer.val_dataset is not None
    n = trainer.val_dataset.n_tokens
    tokens = torch.from_numpy(trainer.val_dataset.read(0, n).astype("int64"))
    total, right = 0.0, 0
    with torch.no_grad():
        for start in range(0, n - 1, 16):
            piece = tokens[start : start + 17]
            logits = trainer.model.logits(trainer.model(piece[None, :-1]))[0]
            total += F.cross_entropy(logits, piece[1:], reduction="sum").item()
            right += int((logits.argmax(-1) == piece[1:]).sum())
    assert row["val_loss"] == pytest.approx(total / (n - 1), rel=1e-5)
    assert row["val_accuracy"] == pytest.approx(right / (n - 1))
    assert row["val_ppl"] == pytest.approx(math.exp(total / (n - 1)), rel=1e-4)
    assert row["val_bpb"] == pytest.approx(
        total / math.log(2) / trainer.val_dataset.n_bytes, rel=1e-5
    )
    other = build(load_config(toy, ["eval.batch_size=3"])).evaluate()
    assert other["val_loss"] == pytest.approx(row["val_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("horizon", "n_steps"), [("steps=5", 5), ("tokens=200", 4), ("tokens=192", 3), ("epochs=1", 63)]
)
def test_each_horizon_ends_at_its_step(toy: Path, horizon: str, n_steps: int) -> None:
    values = [f"train.{horizon}", "log.every_steps=1000"]
    if not horizon.startswith("steps"):
        values.append("train.steps=none")
    trainer = build(load_config(toy, values))
    trainer.fit()
    assert trainer.step_count == n_steps


def test_an_epoch_ends_with_a_partial_step_that_counts_every_sample_once(toy: Path) -> None:
    values = ["train.steps=none", "train.epochs=1", "train.tokens_per_step=192"]
    trainer = build(load_config(toy, values))
    seen = 0
    one_step = trainer.train_step

    def counting(batches: Any, lr: float) -> None:
        nonlocal seen
        seen += sum(int((b.targets != -100).sum()) for b in batches)
        one_step(batches, lr)

    trainer.train_step = counting  # type: ignore[assignment]
    for name in ("numbers", "state", "compile_mode"):
        setattr(counting, name, getattr(one_step, name))
    trainer.fit()
    assert trainer.accumulation == 3
    n_samples = trainer.train_loader.samples_per_epoch
    assert n_samples % 12 != 0  # so that the last step is a partial one
    assert seen == n_samples * 16


def test_train_epoch_ends_at_the_epoch(toy: Path) -> None:
    trainer = build(load_config(toy, ["train.steps=100", "log.every_steps=1000"]))
    per_epoch = math.ceil(trainer.train_loader.samples_per_epoch / 4)
    assert trainer.train_epoch() == "done"
    assert trainer.step_count == per_epoch
    trainer.train_epoch()
    assert trainer.step_count == 100


def test_R11_a_time_limit_ends_the_run(toy: Path) -> None:
    values = ["train.steps=none", "train.hours=0.0006", "schedule.name='linear'"]
    trainer = build(load_config(toy, values))
    trainer.fit()
    assert trainer.total_steps is not None
    assert trainer.step_count >= 20
    assert trainer.trained_s < 2 * 0.0006 * 3600 + 1
    assert trainer.last_lr < 3e-3  # the schedule knew its end


def test_a_requested_stop_ends_with_a_checkpoint(toy: Path, tmp_path: Path) -> None:
    trainer = build(load_config(toy), tmp_path / "run")
    trainer.request_stop(at_step=5)
    assert trainer.fit() == "stopped"
    assert trainer.writer is not None
    trainer.writer.wait()
    assert (tmp_path / "run/checkpoints/step-00000005/manifest.json").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_R1_resuming_continues_the_very_same_trajectory(
    toy: Path, tmp_path: Path, optimizer: str
) -> None:
    config = load_config(
        toy, [f"optim.name={optimizer}", "model.dropout=0.1", "train.tokens_per_step=128"]
    )
    whole = build(config, tmp_path / "whole")
    whole.fit()
    for at in (1, 7, 11):
        run_dir = tmp_path / f"stopped-{at}"
        first = build(config, run_dir)
        first.request_stop(at_step=at)
        first.fit()
        assert first.writer is not None
        first.writer.wait()
        path = run_dir / "checkpoints" / f"step-{at:08d}"
        state = json.loads((path / "state.json").read_text())
        second = build(config, run_dir, position=state["position"])
        torch.manual_seed(999)  # whatever the process did before must not matter
        second.load_checkpoint(path)
        assert second.fit() == "done"
        assert second.step_count == 12
        for p, q in zip(whole.model.parameters(), second.model.parameters(), strict=True):
            assert torch.equal(p, q)
        losses = [(r["step"], float(r["loss"]).hex()) for r in rows(run_dir)]
        assert losses == [(r["step"], float(r["loss"]).hex()) for r in rows(tmp_path / "whole")]


def test_best_is_kept_and_follows_the_lowest_validation_loss(toy: Path, tmp_path: Path) -> None:
    config = load_config(
        toy, ["eval.every_steps=3", "checkpoint.keep_last=1", "optim.lr=1e-2", "train.steps=12"]
    )
    trainer = build(config, tmp_path / "run")
    trainer.fit()
    assert trainer.writer is not None
    trainer.writer.wait()
    evaluated = {row["step"]: row["val_loss"] for row in rows(tmp_path / "run", "eval")}
    assert sorted(evaluated) == [3, 6, 9, 12]
    best = min(evaluated, key=lambda step: evaluated[step])
    folder = tmp_path / "run/checkpoints"
    assert (folder / "best").read_text().strip() == f"step-{best:08d}"
    assert (folder / "latest").read_text().strip() == "step-00000012"
    assert {p.name for p in folder.glob("step-*")} == {f"step-{s:08d}" for s in {best, 12}}


def test_R18_nonfinite_steps_in_a_row_end_the_run_with_a_reason(toy: Path) -> None:
    trainer = build(load_config(toy, ["train.steps=100"]))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train_step.criterion = lambda model, tokens, *_: model(tokens).sum() * float("nan")
    with pytest.raises(FloatingPointError, match="and 19 more up to step 20; there is no checkpoint"):
        trainer.fit()
    assert trainer.step_count == MAX_SKIPPED_IN_A_ROW
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before, strict=True))


def test_a_checkpoint_of_another_model_is_refused(toy: Path, tmp_path: Path) -> None:
    first = build(load_config(toy, ["train.steps=3"]), tmp_path / "run")
    first.fit()
    assert first.writer is not None
    first.writer.wait()
    other = build(load_config(toy, ["model.dim=64"]))
    with pytest.raises(Exception, match="another model"):
        other.load_checkpoint(tmp_path / "run/checkpoints/step-00000003")


def test_the_position_survives_a_change_of_the_batch(toy: Path, tmp_path: Path) -> None:
    first = build(load_config(toy), tmp_path / "run")
    first.request_stop(at_step=4)
    first.fit()
    assert first.writer is not None
    first.writer.wait()
    position = first.position
    assert position == 16
    wider = load_config(toy, ["train.tokens_per_step=128"])
    second = build(wider, tmp_path / "run", position=position)
    second.load_checkpoint(tmp_path / "run/checkpoints/step-00000004")
    second.request_stop(at_step=6)
    second.fit()
    assert second.position == 16 + 2 * 8
    assert rows(tmp_path / "run")[-1]["tokens"] == second.position * 16
