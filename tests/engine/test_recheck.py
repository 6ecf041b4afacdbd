"""R33: a step that the hardware computes wrongly is found by running it again."""

import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from fasttrain.config import config_from_dict, load_config
from fasttrain.data.loader import Batch
from fasttrain.device import resolve_precision
from fasttrain.engine.loop import TrainingLoop
from fasttrain.engine.optim import build_optimizers
from fasttrain.engine.saving import collect
from fasttrain.engine.step import FINE, PERSISTENT, TRANSIENT, TrainStep
from fasttrain.model.transformer import Transformer
from fasttrain.resolve import resolve
from tests.support import toy_trainer
from tests.support.toy import write_config
from tests.support.toy_trainer import digest, rows

CPU = torch.device("cpu")


def make(optimizer: str = "adamw") -> TrainStep:
    config = config_from_dict(
        {
            "run": {"compile": "off", "dtype": "fp32"},
            "model": {"vocab_size": 64, "dim": 16, "n_layers": 1, "n_heads": 2, "dropout": 0.1},
            "data": {"path": "unused", "seq_len": 12},
            "train": {"steps": 4, "ema_decay": 0.5, "on_spike": "skip"},
            "optim": {"name": optimizer},
            "log": {"every_steps": 1},
        }
    )
    torch.manual_seed(0)
    model = Transformer(config.model, seq_len=12).train()
    precision = resolve_precision("fp32", CPU)
    optimizers = build_optimizers(model, config.optim, precision.compute)
    return TrainStep(model, optimizers, resolve(config, CPU))


def batches() -> list[Batch]:
    """Two micro-batches of unlike numbers of targets."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 64, (2, 3, 12), generator=generator)
    targets = torch.randint(0, 64, (2, 3, 12), generator=generator)
    targets[1, :, 5:] = -100
    return [Batch(*pair, None, 3) for pair in zip(tokens, targets, strict=True)]


def everything(step: TrainStep) -> dict[str, Tensor]:
    """Return copies of all that a run's future depends on, random states too."""
    groups = collect(step)
    return {f"{g}/{n}": t.detach().clone() for g in groups for n, t in groups[g].items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def verdict(step: TrainStep) -> int:
    return step.numbers()[-1].verdict


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_R33_a_step_that_is_run_twice_changes_no_bit(optimizer: str) -> None:
    ends = []
    for recheck in (False, True):
        step = make(optimizer)
        for _ in range(3):
            step(batches(), 1e-2, recheck=recheck)
            assert verdict(step) == FINE
        ends.append(everything(step) | {"loss": step.loss, "norm": step.norm})
    assert differing(*ends) == []


class Flips:
    """Flips a bit in what some of the passes of a step read or make, and notes their gradients."""

    def __init__(self, step: TrainStep, kind: str, passes: set[int], seed: int) -> None:
        self.step, self.kind, self.passes = step, kind, passes
        self.chance = random.Random(seed)
        self.results: list[Tensor] = []  # of each pass, the bits of loss and gradients
        self.real = step._backward
        step._backward = self.backward  # type: ignore[method-assign]

    def flip(self, tensor: Tensor) -> None:
        words, bit = tensor.view(torch.int32).view(-1), self.chance.randrange(32)
        words[self.chance.randrange(len(words))] ^= -(2**31) if bit == 31 else 1 << bit

    def backward(self, given: list[Batch]) -> tuple[Tensor, list[Tensor]]:
        planted = len(self.results) in self.passes
        undo = getattr(self, self.kind)() if planted else None
        loss, grads = self.real(given)
        if planted:
            undo()
        self.results.append(torch.cat([t.flatten() for t in (loss, *grads)]).view(torch.int32))
        return loss, grads

    def parameter(self) -> Callable[[], object]:
        """Of a parameter, for as long as the pass lasts."""
        parameter = self.chance.choice(self.step.parameters)
        sound = parameter.detach().clone()
        self.flip(parameter.data)
        return lambda: parameter.data.copy_(sound)

    def activation(self) -> Callable[[], object]:
        """Of what a module returns, in one of the micro-batches."""
        modules = [m for m in self.step.model.modules() if next(m.parameters(), None) is not None]
        n_left = self.chance.randrange(2)

        def hook(module: object, given: object, out: Tensor) -> Tensor:
            nonlocal n_left
            n_left -= 1
            if n_left == -1:
                out = out.clone(memory_format=torch.contiguous_format)
                self.flip(out.data)
            return out

        return self.chance.choice(modules).register_forward_hook(hook).remove

    def gradient(self) -> Callable[[], object]:
        """Of a parameter's gradient, as it is made."""

        def hook(gradient: Tensor) -> Tensor:
            gradient = gradient.clone(memory_format=torch.contiguous_format)
            self.flip(gradient)
            return gradient

        return self.chance.choice(self.step.parameters).register_hook(hook).remove


@pytest.mark.parametrize(("kind", "n"), [("parameter", 34), ("activation", 33), ("gradient", 33)])
def test_R33_a_hundred_of_a_hundred_flipped_bits_are_found(kind: str, n: int) -> None:
    """One in the first or the second time, of those that change any bit of loss or gradients."""
    step, found, real = make(), 0, TrainStep._backward
    step(batches(), 1e-2)  # there are moments
    for seed in range(10 * n):
        before = everything(step)
        step._backward = partial(real, step)  # type: ignore[method-assign]
        flips = Flips(step, kind, {seed % 2}, seed)
        step(batches(), 1e-2, recheck=True)
        told = verdict(step)
        if torch.equal(*flips.results[:2]):  # as in a row of the embedding that no token has
            assert told == FINE
            continue
        assert told == TRANSIENT
        assert len(flips.results) == 3
        assert [k for k in differing(before, everything(step)) if k != "trainer/cpu"] == []
        found += 1
        if found == n:
            return
    raise AssertionError(f"only {found} flips changed anything")


def test_R33_what_comes_out_otherwise_each_time_is_persistent() -> None:
    for passes in ({0, 1}, {0, 2}, {1, 2}, {0, 1, 2}):
        step = make()
        Flips(step, "gradient", passes, 7)
        step(batches(), 1e-2, recheck=True)
        assert verdict(step) == PERSISTENT


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The end of a run of which nothing is run again."""
    trainer, _ = run(tmp_path_factory.mktemp("sound"), set(), "train.recheck_every_steps=none")
    assert trainer.fit() == "done"
    trainer.close()
    return digest(trainer)


RUN = ["model.dropout=0.1", "train.recheck_every_steps=7", "train.tokens_per_step=128"]
RUN += ["checkpoint.every_steps=3", "checkpoint.keep_last=9", "train.steps=9"]


def run(folder: Path, passes: set[int], *keys: str) -> tuple[TrainingLoop, list[str]]:
    """Build a run in whose step 7, which is run again, a bit flips in some passes; its warnings."""
    warnings: list[str] = []
    console = MagicMock(warn=warnings.append)
    config = load_config(write_config(folder), [*RUN, *keys])
    trainer = toy_trainer.build(config, folder / "run", console=console)
    flips = Flips(trainer.train_step, "gradient", {6 + n for n in passes}, seed=1)
    assert flips.results == []  # six steps come before
    return trainer, warnings


@pytest.mark.parametrize("passes", [set(), {0}, {1}])
def test_R33_a_run_that_goes_back_ends_at_the_bits_of_a_sound_one(
    sound: str, passes: set[int], tmp_path: Path
) -> None:
    """A transient error is not of the samples: they are trained on again."""
    trainer, warnings = run(tmp_path, passes, "train.on_nonfinite=rollback")
    assert trainer.fit() == "done"
    assert digest(trainer) == sound
    assert trainer.state.faults.rollbacks == len(warnings) // 2 == len(passes)
    assert not (tmp_path / "run/faults").exists()
    if warnings:
        assert "step 7: transient" in warnings[0]
        assert re.search(r"\bstep 6\b.*step-00000006\b.*\bstep 7\b", warnings[1])


def test_R33_a_step_that_came_out_otherwise_is_skipped_or_ends_the_run(tmp_path: Path) -> None:
    trainer, warnings = run(tmp_path / "a", {1})
    assert trainer.fit() == "done"
    assert [row["skipped_steps"] for row in rows(tmp_path / "a/run")] == [0] * 6 + [1] * 3
    assert re.search("step 7: transient.*no update", warnings[0])
    trainer, _ = run(tmp_path / "b", {1}, "train.on_nonfinite=stop")
    with pytest.raises(
        FloatingPointError, match=r"step 7: transient.*train\.on_nonfinite = 'stop'"
    ):
        trainer.fit()
    trainer, _ = run(tmp_path / "c", set(range(100)), "train.on_nonfinite=rollback")
    with pytest.raises(FloatingPointError, match=r"step 7: persistent.*\b3 times\b"):
        trainer.fit()
    assert trainer.state.step == 7
