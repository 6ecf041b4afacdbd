"""A TrainingLoop on the toy dataset, and batches that are made bad, shared by tests."""

import hashlib
import itertools
import json
import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.config import TrainConfig
from fasttrain.data.format import open_dataset
from fasttrain.data.loader import Loader
from fasttrain.data.order import LoaderOptions
from fasttrain.device import resolve_device
from fasttrain.engine.loop import TrainingLoop
from fasttrain.engine.optim import build_optimizers
from fasttrain.engine.saving import collect
from fasttrain.model.transformer import Transformer
from fasttrain.resolve import resolve

number = itertools.count()  # of runs without a folder of their own
opened: Any = deque(maxlen=0)  # where tests/engine collects trainers to be closed


def build(
    config: TrainConfig,
    run_dir: Path | None = None,
    position: int = 0,
    device: str = "cpu",
    console: Any = None,
) -> TrainingLoop:
    """Make a TrainingLoop as a session does; tests/engine closes it, elsewhere whoever calls."""
    assert config.data.path is not None
    train, val = (open_dataset(config.data.path, split) for split in ("train", "val"))
    torch.manual_seed(config.run.seed)
    model_config = replace(config.model, vocab_size=train.vocab_size)
    model = Transformer(model_config, seq_len=config.data.seq_len)
    run_dir = run_dir or Path(config.data.path).parent / f"unnamed-{next(number)}"
    run_dir.mkdir(exist_ok=True)
    trainer = TrainingLoop(
        model,
        build_optimizers(model, config.optim),
        resolve(config, resolve_device(config.run.device)),
        train_loader=Loader(
            train,
            LoaderOptions.of(config, micro_batch=config.train.micro_batch),
            device=device,
            position=position,
        ),
        val_dataset=val,
        run_dir=run_dir,
        console=console,
    )
    opened.append(trainer)
    return trainer


def resume(config: TrainConfig, checkpoint: Path, run_dir: Path | None = None) -> TrainingLoop:
    """Make a loop that goes on from a checkpoint, in a process whose past must not matter."""
    state = json.loads((checkpoint / "state.json").read_text())
    trainer = build(config, run_dir, position=state["position"])
    torch.manual_seed(999)
    trainer.saver.load(checkpoint)
    return trainer


def rows(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Return the rows of one kind in a run's ``metrics.jsonl``."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def digest(trainer: TrainingLoop) -> str:
    """Return the SHA-256 of all that a run's future depends on: parameters, moments, RNG, …"""
    groups = collect(trainer.train_step)
    found = hashlib.sha256()
    for group in sorted(groups):
        for name, tensor in sorted(groups[group].items()):
            found.update(f"{group}/{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    found.update(f"{trainer.state.step} {trainer.state.position}".encode())
    return found.hexdigest()


def batch_of(trainer: TrainingLoop, step: int) -> Tensor:
    """Return the tokens of the first micro-batch of a step, as the data's order has it."""
    loader = trainer.train_loader
    with loader.at((step - 1) * trainer.state.samples_per_step) as other:
        return next(other).tokens


def spoil(
    trainer: TrainingLoop,
    steps: range | list[int],
    how: Callable[[Tensor], Tensor] = lambda loss: loss * math.nan,
) -> None:
    """Make the loss bad wherever the samples of these steps are trained on, not by the count."""
    batches = [batch_of(trainer, step) for step in steps]
    sound = trainer.train_step.criterion

    def spoiled(model: Transformer, tokens: Tensor, *inputs: Tensor | None) -> Tensor:
        loss = sound(model, tokens, *inputs)
        return how(loss) if any(torch.equal(tokens, bad) for bad in batches) else loss

    trainer.train_step.criterion = spoiled


def value_of(tensor: Tensor) -> float:
    """Return a scalar's value, as code outside of tests would read it."""
    return float(tensor.item())
