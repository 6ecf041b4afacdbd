"""The Trainer for custom models: exact losses, padding, resume, callbacks, transformers."""

import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader

import fasttrain
from fasttrain import Callback, TrainConfig, Trainer, checkpoint, train_loop
from fasttrain.config import LogConfig, LoopConfig, RunConfig, UserError, config_from_dict
from fasttrain.config.keys import Section
from fasttrain.library.arguments import OBEYED

V, T = 17, 6


class Toy(nn.Module):
    """The smallest model with dropout that maps tokens to logits."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(V, 8), nn.Linear(8, V)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.dropout(self.table(tokens).cumsum(1)))


def config(**sections: dict[str, Any]) -> TrainConfig:
    base: dict[str, dict[str, Any]] = {
        "run": {"device": "cpu", "dtype": "fp32"},
        "train": {"steps": 8},
        "log": {"every_steps": 1},
    }
    return config_from_dict({k: base.get(k, {}) | sections.get(k, {}) for k in base | sections})


def data(n: int = 24, seed: int = 0, padded: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (n, T), generator=generator)
    rows = [{"input_ids": row, "labels": row.clone()} for row in ids]
    for index, row in enumerate(rows):
        if padded:
            row["attention_mask"] = (torch.arange(T) < 2 + index % (T - 1)).long()
    return rows


def toy(seed: int = 0, **options: Any) -> Toy:
    torch.manual_seed(seed)
    return Toy(**options)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_package_gives_the_library() -> None:
    for name in ("Trainer", "TrainConfig", "load_config", "train_loop", "diagnose"):
        assert callable(getattr(fasttrain, name)), name
    assert fasttrain.Trainer.__module__ == "fasttrain.library.trainer"


def test_a_step_is_the_mean_over_all_target_tokens_however_they_are_batched() -> None:
    """Batches of 2, 3 and 1 rows with padding, accumulated, equal one batch of 6 rows."""
    rows = data(6, padded=True)
    results = []
    for sizes in ([6], [2, 3, 1]):
        model = toy()
        trainer = Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=1.0),
            config=config(train={"steps": 1, "max_grad_norm": None}),
            accumulate=len(sizes),
        )
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        batches = [
            {k: torch.stack([row[k] for row in rows[a : a + n]]) for k in rows[0]}
            for a, n in zip(starts, sizes, strict=True)
        ]
        trainer.train(batches)
        results.append((trainer.metrics.values("loss")[0], weights(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)


def test_criterion_with_an_ignore_index_of_its_own_and_metrics() -> None:
    ids = torch.stack([row["input_ids"] for row in data(4)])
    labels = ids.masked_fill(ids == 3, 0)
    model = toy()
    trainer = Trainer(
        model,
        torch.optim.AdamW(model.parameters()),
        None,
        nn.CrossEntropyLoss(ignore_index=0),
        config(),
        metrics={"accuracy": lambda logits, targets: (logits.argmax(-1) == targets).float().mean()},
    )
    # Batches of unlike numbers of targets: a mean of their means would be another.
    result = trainer.evaluate([{"input_ids": ids[i : i + n], "labels": labels[i : i + n]}
                               for i, n in ((0, 1), (1, 3))])  # fmt: skip
    logits, targets = model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    expected = nn.functional.cross_entropy(logits, targets, ignore_index=0).item()
    keep = targets != 0
    right = (logits.argmax(-1) == targets)[keep].float().mean().item()
    assert result["val_loss"] == pytest.approx(expected, rel=1e-6)
    assert result["val_accuracy"] == pytest.approx(right, rel=1e-6)


class Watcher(Callback):
    """Keeps what it was told, and stops at a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.events: list[str] = []
        self.stop_at = stop_at

    def on_step_end(self, trainer: Trainer) -> None:
        self.events.append(f"step {trainer.step}")
        if trainer.step == self.stop_at:
            trainer.stop()

    def on_epoch_end(self, trainer: Trainer) -> None:
        self.events.append(f"epoch {trainer.epoch}")

    def on_evaluate(self, trainer: Trainer, result: dict[str, float]) -> None:
        self.events.append(f"evaluate {sorted(result)}")

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        assert (path / "manifest.json").is_file()
        self.events.append(f"checkpoint {path.name}")


def test_callbacks_are_told_in_order_and_can_stop(tmp_path: Path) -> None:
    model, watcher = toy(), Watcher(stop_at=5)
    trainer = Trainer(
        model,
        torch.optim.AdamW(model.parameters()),
        config=config(train={"steps": 100}, eval={"every_steps": 2}),
        run_dir=tmp_path / "run",
        callbacks=[watcher],
    )
    trainer.train(DataLoader(data(12), batch_size=4), DataLoader(data(4, seed=1), batch_size=2))
    told = "evaluate ['val_loss', 'val_ppl']"
    assert watcher.events == [
        "step 1", told, "step 2", "step 3", "epoch 1", told, "step 4", "step 5", told,
        "checkpoint step-00000005",
    ]  # fmt: skip


@pytest.mark.parametrize("stop_at", [4, 7])
def test_a_resumed_training_is_the_same_to_the_bit(tmp_path: Path, stop_at: int) -> None:
    """Shuffled data, dropout, Adam's moments, a schedule and averaged weights go on as they were.

    Six batches an epoch in groups of two: step 4 is within an epoch, 7 in a later one.
    """

    def make(run: str, *callbacks: Callback) -> tuple[Toy, Trainer]:
        model = toy(dropout=0.3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = StepLR(optimizer, 3, 0.5)
        settings = config(train={"steps": 10, "ema_decay": 0.9}, log={"csv": True})
        return model, Trainer(
            model, optimizer, scheduler, None, settings,
            run_dir=tmp_path / run, accumulate=2, callbacks=callbacks,
        )  # fmt: skip

    loader = DataLoader(data(24, padded=True), batch_size=4, shuffle=True)
    straight_model, straight = make("straight")
    straight.train(loader)
    _, first = make("resumed", Watcher(stop_at=stop_at))
    first.train(loader)
    torch.manual_seed(99)
    model, second = make("resumed")
    torch.manual_seed(98)
    second.load_checkpoint()
    assert second.step == stop_at
    second.train(loader)
    assert torch.equal(weights(model), weights(straight_model))
    ours, theirs = second.ema.averages, straight.ema.averages
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    lines = (tmp_path / "resumed/metrics.jsonl").read_text().splitlines()
    rows = list(map(json.loads, lines))
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 11))
    made = [row for row in rows if row["kind"] == "run"]
    assert [row["step"] for row in made] == [0, stop_at]
    assert rows[0] == made[0]
    parent = f"{tmp_path}/resumed/checkpoints/step-{stop_at:08d}"
    assert [row["parent"] for row in made] == [None, parent]
    assert checkpoint.load(checkpoint.resolve(tmp_path / "resumed")).state["provenance"] == {
        key: value for key, value in made[1].items() if key not in ("kind", "time", "step")
    }
    table = (tmp_path / "resumed/train.csv").read_text().splitlines()
    assert len(table) == 11
    assert straight.metrics.values("lr")[-1] == pytest.approx(1e-2 * 0.5**3)


def test_a_training_prints_the_lines_of_the_command_line_unless_it_is_quiet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for quiet in (False, True):
        model = toy()
        trainer = Trainer(
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-3),
            config=config(log={"every_steps": 4}, eval={"every_steps": 6}),
            metrics={"entropy": lambda logits, targets: logits.softmax(-1).square().mean()},
            run_dir=tmp_path / f"run-{quiet}",
            quiet=quiet,
        )
        trainer.train(DataLoader(data(), batch_size=4), DataLoader(data(4), batch_size=4))
        lines = capsys.readouterr().out.splitlines()
        if quiet:
            assert not lines
            continue
        assert [line.split()[:2] for line in lines] == [
            ["step", "4"], ["step", "6"], ["eval", "6"], ["step", "8"], ["eval", "8"],
            ["saved", str(tmp_path / "run-False/checkpoints/step-00000008")],
        ]  # fmt: skip
        for name in ("loss", "lr 1.00e-03", "tok/s", "done  50%", "left"):
            assert name in lines[0]
        assert "done 100%" in lines[3]
        assert f"entropy {trainer.metrics.values('val_entropy')[-1]:.4f}" in lines[4]


def test_a_terminal_shows_a_bar_that_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, bar, model = [], Mock(), toy()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("fasttrain.log.console.Live", bar)
    monkeypatch.setattr(
        "fasttrain.log.console.Console.progress", lambda _, *values: drawn.append(values)
    )
    trainer = Trainer(model, torch.optim.AdamW(model.parameters()), config=config())
    trainer.train_epoch(DataLoader(data(), batch_size=4))
    assert [(step, last, tokens) for step, last, tokens, *_ in drawn] == [
        (n, 6, n * 4 * T) for n in range(1, 7)
    ]
    assert drawn[-1][3:] == (1.0, 0.0)
    bar.return_value.stop.assert_called()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model", "gpt2", r"model .*'gpt2'.*torch\.nn\.Module"),
        ("model", Toy, r"model .*class Toy\b.*Toy\(…\)"),
        ("optimizer", None, r"optimizer .*None.*torch\.optim"),
        ("optimizer", torch.optim.AdamW, r"optimizer .*class AdamW\b.*torch\.optim"),
        ("scheduler", "cosine", r"scheduler .*'cosine'.*torch\.optim\.lr_scheduler"),
        ("scheduler", StepLR, r"scheduler .*class StepLR\b.*torch\.optim\.lr_scheduler"),
        ("criterion", "ce", "criterion .*'ce'.*logits"),
        ("criterion", nn.CrossEntropyLoss, r"criterion .*class CrossEntropyLoss\b.*logits"),
        ("config", 3, r"config .*\bint\b.*TrainConfig"),
        ("run_dir", 3, r"run_dir .*\b3\b.*folder"),
        ("run_dir", ["runs"], r"run_dir .*\blist\b.*folder"),
        ("accumulate", 2.0, r"accumulate .*2\.0.*batches"),
        ("accumulate", "2", "accumulate .*'2'.*batches"),
        ("accumulate", True, "accumulate .*True.*batches"),
        ("accumulate", 0, r"accumulate .*\b0\b"),
        ("metrics", [max], r"metrics .*\blist\b.*dict"),
        ("metrics", {"accuracy": 0.5}, r"metrics\['accuracy'\] .*0\.5.*function"),
        ("metrics", {1: max}, r"metrics .*\b1\b.*string"),
        ("callbacks", None, "callbacks .*None.*list"),
        ("callbacks", "log", "callbacks .*'log'.*on_step_end"),
        ("callbacks", [None], "callbacks .*None.*on_step_end"),
        ("quiet", "no", "quiet .*'no'.*True.*False"),
    ],
)
def test_an_argument_of_a_wrong_kind_is_one_line_that_names_it(
    name: str, value: Any, message: str
) -> None:
    model = toy()
    arguments = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    with pytest.raises(UserError, match=f"^Trainer: {message}") as caught:
        Trainer(**{"config": config(), **arguments, name: value})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_what_is_no_loader_or_no_path_is_named() -> None:
    model = toy()
    trainer = Trainer(model, torch.optim.AdamW(model.parameters()), config=config())
    batch = {"input_ids": torch.ones(2, T).long()}
    for call, message in (
        (lambda: trainer.train(None), "train_loader .*None.*DataLoader"),  # type: ignore[arg-type]
        (lambda: trainer.train(batch), r"train_loader .*\bdict\b.*DataLoader"),
        (lambda: trainer.train([batch], 3), r"val_loader .*\b3\b.*DataLoader"),  # type: ignore[arg-type]
        (lambda: trainer.train_epoch("text"), "loader .*'text'.*DataLoader"),
        (lambda: trainer.save_checkpoint(3), r"path .*\b3\b.*folder"),  # type: ignore[arg-type]
        (lambda: trainer.load_checkpoint(3), r"path .*\b3\b.*folder"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError, match=f"^Trainer: {message}"):
            call()
    assert trainer.step == 0


def test_lists_in_a_batch_are_refused_with_a_hint_at_collate_fn() -> None:
    model = toy()
    trainer = Trainer(model, torch.optim.AdamW(model.parameters()), config=config())
    for batch in ({"input_ids": [[1, 2], [3]]}, [{"input_ids": [1, 2]}] * 3):
        with pytest.raises(UserError, match=r"\blist\b.*collate_fn"):
            trainer.train([batch])


def test_labels_that_are_all_ignored_are_warned_of_once() -> None:
    model = toy()
    before = weights(model)
    labels = torch.full((2, T), -100)
    batch = {"input_ids": torch.ones(2, T).long(), "labels": labels}
    trainer = Trainer(model, torch.optim.AdamW(model.parameters()), config=config())
    with pytest.warns(UserWarning, match="labels .*-100.*ignore_index") as caught:
        trainer.train([batch] * 8)
    assert len(caught) == 1
    assert trainer.skipped_steps == 8
    assert torch.equal(weights(model), before)


@pytest.mark.filterwarnings("ignore:Trainer. step . .*target")
def test_a_step_without_targets_has_no_loss(tmp_path: Path) -> None:
    ids = data(1)[0]["input_ids"][None]
    empty = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    losses = []
    for loader in ([ids, ids], [ids, empty, ids, empty]):
        model = toy()
        trainer = Trainer(
            model, torch.optim.SGD(model.parameters(), lr=0.1), None, None, config(),
            run_dir=tmp_path / str(len(loader)),
        )  # fmt: skip
        losses.append((trainer.train_epoch(loader), trainer.metrics.values("loss")))
    assert losses[0] == losses[1]
    assert math.isnan(trainer.train_epoch([empty]))
    rows = map(json.loads, (tmp_path / "4" / "metrics.jsonl").read_text().splitlines())
    written = [row["loss"] for row in rows if row["kind"] == "train"]
    assert [loss is None for loss in written] == [False, True, False, True, True]
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorded = train_loop(model, [ids, empty], optimizer, 1, log_interval=1, device="cpu")
    assert recorded["steps"] == [1]


def test_what_is_frozen_wholly_is_said() -> None:
    model = toy()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), config=config())
    model.requires_grad_(False)
    with pytest.raises(UserError, match=r"optimizer .*gradient.*requires_grad_\(\)"):
        trainer.train([data(1)[0]["input_ids"][None]])


def test_a_scheduler_of_another_optimizer_is_refused() -> None:
    model = toy()
    optimizer, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    with pytest.raises(UserError, match=r"scheduler .*\bSGD\b.*optimizer"):
        Trainer(model, optimizer, StepLR(other, 1))


def test_train_epoch_returns_the_mean_loss_of_its_steps() -> None:
    model = toy()
    trainer = Trainer(model, torch.optim.AdamW(model.parameters(), lr=1e-2), config=config())
    loader = DataLoader(data(12), batch_size=4)
    first, second = trainer.train_epoch(loader), trainer.train_epoch(loader)
    assert (trainer.step, trainer.epoch) == (6, 2)
    losses = trainer.metrics.values("loss")
    assert [first, second] == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3])
    assert second < first


def test_nonfinite_steps_are_skipped_or_stop() -> None:
    class Broken(nn.CrossEntropyLoss):
        calls = 0

        def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(logits, targets) * (math.nan if self.calls == 2 else 1.0)

    for policy in ("skip", "stop"):
        model = toy()
        trainer = Trainer(
            model,
            torch.optim.AdamW(model.parameters()),
            None,
            Broken(),
            config(train={"steps": 3, "on_nonfinite": policy}),
        )
        if policy == "stop":
            with pytest.raises(FloatingPointError, match="step 2"):
                trainer.train(DataLoader(data(), batch_size=4))
        else:
            trainer.train(DataLoader(data(), batch_size=4))
            assert trainer.skipped_steps == 1
            assert torch.isfinite(weights(model)).all()


def test_early_stopping_and_plateau_of_torch() -> None:
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)  # nothing ever improves
    settings = config(train={"steps": 100}, eval={"every_steps": 1, "patience": 4})
    trainer = Trainer(
        model, optimizer, ReduceLROnPlateau(optimizer, patience=1, eps=0.0), None, settings
    )
    loader = DataLoader(data(8), batch_size=4)
    metrics = trainer.train(loader, loader)
    assert trainer.step == 5  # the first evaluation is the best, then four without a better one
    assert optimizer.param_groups[0]["lr"] < 1e-30
    assert metrics.summary()["steps"] == 5


def test_an_evaluation_that_is_nan_hinders_no_save(tmp_path: Path) -> None:
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = config(train={"steps": 2}, eval={"every_steps": 2})
    results = []

    class Spoil(Callback):
        """Makes the model NaN for the time of step 2 and its evaluation."""

        def on_step_end(self, trainer: Trainer) -> None:
            if trainer.step == 1:
                self.fill(math.nan)

        def on_evaluate(self, trainer: Trainer, result: dict[str, float]) -> None:
            results.append(result["val_loss"])
            self.fill(0.5)

        def fill(self, value: float) -> None:
            with torch.no_grad():
                next(model.parameters()).fill_(value)

    trainer = Trainer(
        model, optimizer, None, None, settings, run_dir=tmp_path / "run", callbacks=[Spoil()]
    )
    loader = DataLoader(data(8), batch_size=4)
    trainer.train(loader, loader)
    assert [math.isnan(result) for result in results] == [True]
    trainer.val_losses.clear()
    trainer.load_checkpoint()
    assert trainer.val_losses == [sys.float_info.max]


@pytest.mark.parametrize("with_run_dir", [False, True])
def test_a_checkpoint_is_written_where_it_is_told_to(with_run_dir: bool, tmp_path: Path) -> None:
    def make() -> Trainer:
        model = toy(dropout=0.1)
        run_dir = tmp_path / "run" if with_run_dir else None
        return Trainer(
            model, torch.optim.AdamW(model.parameters()), config=config(), run_dir=run_dir
        )

    trainer, place = make(), tmp_path / "kept"
    loader = DataLoader(data(), batch_size=4)
    trainer.train_epoch(loader)
    path = trainer.save_checkpoint(place)
    assert path.parent == place
    trainer.train(loader)
    trainer.save_checkpoint(str(place))
    assert {p.name for p in place.glob("step-*")} == {"step-00000006", "step-00000008"}
    for source in (path, place):
        again = make()
        again.load_checkpoint(source)
        assert again.step == (6 if source == path else 8)
        if not with_run_dir:  # that is still the first trainer's
            again.train(loader)
            assert torch.equal(weights(again.model), weights(trainer.model))
    for wrong in (path, *([tmp_path / "run"] if with_run_dir else [])):
        with pytest.raises(UserError, match=f"save_checkpoint: {re.escape(str(wrong))} .*folder"):
            trainer.save_checkpoint(wrong)


def test_max_grad_value_clips_each_element() -> None:
    model = toy()
    before = weights(model)
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        config=config(train={"steps": 1, "max_grad_norm": None, "max_grad_value": 1e-4}),
    )
    trainer.train(DataLoader(data(8), batch_size=8))
    change = (weights(model) - before).abs().max().item()
    assert change == pytest.approx(1e-4, rel=1e-2)


def test_a_config_may_be_a_dict() -> None:
    model = toy()
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = Trainer(model, optimizer, config={"run": {"device": "cpu"}, "train": {"steps": 2}})
    trainer.train(DataLoader(data(), batch_size=4))
    assert trainer.step == 2
    without_horizon = {"run": {"device": "cpu"}, "train": {"max_grad_norm": None}}
    assert Trainer(model, optimizer, config=without_horizon).config.train.epochs == 1
    for wrong, message in (
        ({"lr": 1e-3}, r"\blr .*optim\.lr"),
        ({"train": 3}, r"train .*3.*\[train\]"),
        ("configs/base.toml", r"config .*\bstr\b.*TrainConfig.*load_config\(path\)"),
        (LoopConfig(steps=2), "config .*LoopConfig.*TrainConfig"),
    ):
        with pytest.raises(UserError, match=message):
            Trainer(model, optimizer, config=wrong)  # type: ignore[arg-type]


class Duck:
    """A callback without the base class."""

    steps = 0

    def on_step_end(self, trainer: Trainer) -> None:
        self.steps += 1


def test_a_callback_need_not_inherit_and_what_is_none_is_refused() -> None:
    model = toy()
    optimizer = torch.optim.AdamW(model.parameters())
    duck, alone = Duck(), Duck()
    loader = DataLoader(data(), batch_size=4)
    Trainer(model, optimizer, config=config(), callbacks=(c for c in [duck])).train(loader, loader)
    Trainer(model, optimizer, config=config(), callbacks=alone).train(loader)  # type: ignore[arg-type]
    assert duck.steps == alone.steps == 8
    for wrong in (print, Duck, Watcher, object()):
        with pytest.raises(UserError, match=f"callbacks .*{re.escape(repr(wrong))}.*on_step_end"):
            Trainer(model, optimizer, config=config(), callbacks=[wrong])
    with pytest.raises(UserError, match=r"optimizer .*'adamw'.*torch\.optim"):
        Trainer(model, "adamw", config=config())  # type: ignore[arg-type]


class Hashed(nn.Module):
    """Keeps positions in a table shorter than its vocabulary, and hashes its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.model = nn.Embedding(T, V), toy()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens % V) + self.positions(torch.arange(tokens.shape[1]))


def test_an_index_outside_a_table_names_both_and_nothing_else_is_refused() -> None:
    ids = torch.stack([row["input_ids"] for row in data(4)])
    beyond, negative, longer = ids.clone(), ids.clone(), ids.repeat(1, 2)
    beyond[1, 2], negative[1, 2] = V + 3, -1

    def train(model: nn.Module, *batches: Tensor) -> Trainer:
        trainer = Trainer(model, torch.optim.AdamW(model.parameters()), config=config())
        trainer.train(batches)
        return trainer

    for wrong, name in ((beyond, f"{V + 3}"), (negative, "-1")):
        with pytest.raises(UserError, match=rf"index {name}\b.* {V} .*\btable\b.*tokenizer"):
            train(toy(), ids, wrong)
    labelled = {"input_ids": ids, "target_ids": ids}
    assert torch.isfinite(weights(train(Hashed(), {**labelled, "input_ids": beyond}).model)).all()
    with pytest.raises(UserError, match=rf"index {2 * T - 1}\b.* {T} .*\bpositions\b"):
        train(Hashed(), ids, longer)
    with pytest.raises(UserError, match=rf"target .*\b{V + 3}\b.*\b{V} logits"):
        train(toy(), {**labelled, "target_ids": beyond})
    model = train(toy(), ids, ids).model
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("by", ["trainer", "user", "user, in place"])
def test_to_look_at_ids_does_not_compile_a_model_twice(
    by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fasttrain.resolve._has_cpp_compiler", lambda: True)
    compiled = Mock(side_effect=lambda graph, inputs: graph.forward)
    if by == "trainer":
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiled))
    model: Any = toy()
    if by == "user":
        model = torch.compile(model, backend=compiled)
    elif by == "user, in place":
        model.compile(backend=compiled)
    settings = config(run={"compile": "default" if by == "trainer" else "off"})
    trainer = Trainer(model, torch.optim.AdamW(model.parameters()), config=settings)
    trainer.train([{"input_ids": torch.full((2, T), n)} for n in range(8)])  # each a new highest
    assert compiled.call_count == 1


def test_keys_that_have_no_effect_are_named_in_one_warning(tmp_path: Path) -> None:
    model = toy()
    optimizer = torch.optim.AdamW(model.parameters())
    settings = config(
        optim={"lr": 0.1, "name": "sgd"}, schedule={"warmup_steps": 2},
        log={"profile_steps": [1, 2], "csv": True}, train={"z_loss": 0.1, "label_smoothing": 0.1},
    )  # fmt: skip
    common = ["optim.name", "optim.lr", "schedule.warmup_steps"]
    losses = ["train.label_smoothing criterion=None", "train.z_loss criterion=None"]
    for criterion, run_dir, keys in (
        (nn.CrossEntropyLoss(), None, [*common, *losses, "log.csv run_dir"]),
        (None, tmp_path / "run", common),
    ):
        with pytest.warns(UserWarning, match=r"^Trainer: .*optim\.name") as caught:
            Trainer(model, optimizer, None, criterion, settings, run_dir=run_dir)
        (warning,) = caught
        # Each key, and what it needs to have an effect, which stands behind it in parentheses.
        named = re.findall(r"([a-z]+\.[a-z_]+)(?: \([^)]*?(\S+)\))?", str(warning.message))
        assert [" ".join(filter(None, pair)) for pair in named] == [*keys, "log.profile_steps"]
        assert warning.filename == __file__


def test_the_keys_that_are_said_to_be_obeyed_are_those_that_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[str] = set()

    def spy(section: Section, name: str) -> Any:
        value = object.__getattribute__(section, name)
        if type(section).section and name in type(section).__dataclass_fields__:
            read.add(f"{type(section).section}.{name}")
        return value

    settings = config(
        train={"steps": None, "epochs": 2}, eval={"every_steps": 2, "patience": 9},
        checkpoint={"every_steps": 4},
    )  # fmt: skip
    for name in (
        "library.trainer.warn_of_ignored",
        "library.trainer.config_to_toml",
        "checkpoint.writer.parse",
    ):
        monkeypatch.setattr(f"fasttrain.{name}", lambda *_: "")  # these read every key
    monkeypatch.setattr(Section, "__getattribute__", spy)
    model = toy()
    trainer = Trainer(
        model, torch.optim.AdamW(model.parameters()), config=settings, run_dir=tmp_path / "run"
    )
    loader = DataLoader(data(8), batch_size=4)
    trainer.train(loader, loader)
    others = {"fasttrain.Transformer", "torchrun"}  # here is neither
    obeyed = {key for need, keys in OBEYED.items() if need not in others for key in keys.split()}
    refused = {"train.on_spike", "run.fp8", "eval.tasks"}  # the last for its package alone
    unread = {"checkpoint.asynchronous", "log.wandb_mode"}  # it never is; only with a project
    assert read - refused == obeyed - unread


def test_a_compiled_model_learns_and_is_saved_like_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fasttrain.resolve._has_cpp_compiler", lambda: True)
    # The tracing is real, the C++ left out.
    traced = Mock(side_effect=partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch, "compile", traced)
    results = []
    for mode in ("auto", "default"):
        model = toy()
        settings = config(run={"compile": mode})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        trainer = Trainer(model, optimizer, config=settings, run_dir=tmp_path / mode)
        loader = DataLoader(data(12, padded=True), batch_size=5)
        trainer.train(loader, loader)
        results.append((trainer.metrics.values("val_loss"), weights(model)))
        assert traced.call_count == (mode == "default")
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    trainer.load_checkpoint(tmp_path / "auto")  # the names are those of the model itself


def test_what_is_wrong_with_model_or_config_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Embedding(V, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    flat = nn.Sequential(model, nn.Flatten())
    with pytest.raises(UserError, match=r"logits \(B, T, V\)"):
        Trainer(flat, optimizer, config=config()).train([{"input_ids": torch.ones(2, T).long()}])
    with pytest.raises(UserError, match=r"epoch 1\b.*batch.*DataLoader"):
        Trainer(model, optimizer, config=config()).train([])
    run, log = RunConfig(device="cpu"), LogConfig()
    with pytest.raises(UserError, match=r"train\.steps"):
        Trainer(model, optimizer, config=TrainConfig(run=run, log=log, train=LoopConfig(hours=1)))
    with pytest.raises(UserError, match=r"CUDA graphs.*run\.compile=default"):
        Trainer(model, optimizer, config=config(run={"compile": "max-autotune"}))
    with pytest.raises(UserError, match="run_dir"):
        Trainer(model, optimizer, config=config()).save_checkpoint()
    factor = partial(lambda step: 1.0)
    factor.state = {1, 2}  # type: ignore[attr-defined]  # which LambdaLR keeps
    unsaved = LambdaLR(optimizer, factor)
    with pytest.raises(UserError, match=r"scheduler\.lr_lambdas\.0\.state .*\bset\b.*pickle"):
        Trainer(model, optimizer, unsaved, None, config(), run_dir=tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"'RANK'.*torchrun"):
        Trainer(model, optimizer, config=config())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_transformers_models_train_with_padding(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        shape = {"vocab_size": V, "n_positions": T, "n_embd": 16, "n_layer": 1, "n_head": 2}
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        )
    else:
        shape = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32}
        heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads))
    rows = data(8, padded=True)
    batch = {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
    labels = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = model(**(batch | {"labels": labels})).loss.item()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = Trainer(
        model, optimizer, StepLR(optimizer, 10), None,
        config(train={"steps": 30}), run_dir=tmp_path / "run",
    )  # fmt: skip
    trainer.train([batch], [batch])
    losses = trainer.metrics.values("loss")
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0] - 0.3
    trained = weights(model)
    for p in model.parameters():
        p.data.zero_()
    trainer.load_checkpoint()
    assert torch.equal(weights(model), trained)
