"""Where the time of the trainer's loop goes at configs/base.toml, and what the loop itself costs.

The trainer runs with its loader, log and run folder. After every few of its steps the bare model
runs as many: the same loss, compiled or not as the trainer's is, its backward pass and the same
optimizers on one batch of the same text, of the same length throughout.
`overhead` is the trainer's time from step to step less the bare model's, as a part of it. The
shares come from clocks around the calls inside the trainer's own steps.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fasttrain_kernels import linear_cross_entropy
from torch import Tensor

from benchmarks.harness import CUDA, OURS, comparison
from benchmarks.steps import BASE, LR, Step, dataset_of, loop, parts_of, source_bytes
from fasttrain.config import TrainConfig, load_config
from fasttrain.data.loader import Batch, Loader
from fasttrain.data.order import LoaderOptions
from fasttrain.engine.trainer import Trainer
from fasttrain.log.console import Console
from fasttrain.model.runtime import compile_function, prepare_blocks, resolve_compile

ROUNDS, FULL_ROUNDS, N_STEPS, N_WARM = 12, 40, 2, 4


def bare_step(config: TrainConfig, batch: Batch) -> Step:
    """Return forward, backward and optimizers alone, compiled as the trainer compiles."""
    model, optimizers, device, precision = parts_of(config)

    def loss_of(tokens: Tensor, targets: Tensor) -> Any:
        with precision.autocast():
            return linear_cross_entropy(model.hidden(tokens), model.head_weight, targets)

    mode = resolve_compile(config, device)
    prepare_blocks(model, activation_checkpointing="none", mode=mode, sharded=False)
    fn = loss_of if mode in ("off", "c++") else compile_function(loss_of, mode)
    return loop(fn, batch, optimizers)


class Turns(Console):
    """Takes the time from step to step, and lets the bare model run in between."""

    def __init__(self, log_file: Path, bare: Step) -> None:
        super().__init__(log_file=log_file, interactive=False)
        self.bare = bare
        self.times: dict[str, list[float]] = {OURS: [], "bare model": []}
        self.spent_s: Counter[str] = Counter()  # inside calls of the trainer's steps
        self.paused = True  # in warm-up, and while the bare model runs

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``call`` with a clock around it."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                if not self.paused:
                    self.spent_s[name] += time.perf_counter() - started

        return timed

    def progress(self, step: int, *rest: Any) -> None:
        super().progress(step, *rest)
        if step % N_STEPS:
            return
        ended = time.perf_counter()
        self.paused = True
        for _ in range(N_STEPS):
            self.bare()
        resumed = time.perf_counter()
        if step > N_WARM:
            self.times[OURS].append((ended - self.resumed) / N_STEPS)
            self.times["bare model"].append((resumed - ended) / N_STEPS)
        self.paused, self.resumed = step < N_WARM, resumed


@pytest.mark.skipif(CUDA, reason="clocks around calls time the host alone")
def test_loop(benchmark: Any, full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    n_steps = N_WARM + (FULL_ROUNDS if full else ROUNDS) * N_STEPS
    overrides = [f"data.path={tmp_path}", "data.dtype=uint16", "model.vocab_size=2048"]
    overrides += [f"train.steps={n_steps}", "eval.every_steps=none", "eval.prompts=[]"]
    overrides += ["eval.sample_every_steps=none", "checkpoint.every_steps=none"]
    config = load_config(BASE, overrides)
    dataset = dataset_of(tmp_path, source_bytes(100).astype(np.uint16), 2048)
    model, optimizers, device, _ = parts_of(config)
    sizes = {"seq_len": config.data.seq_len, "micro_batch": config.train.micro_batch}
    with Loader(dataset, LoaderOptions(**sizes), device=device) as loader:
        console = Turns(tmp_path / "log", bare_step(config, next(loader)))
    with Loader(dataset, LoaderOptions(**sizes), device=device) as loader:
        trainer = Trainer(
            model, optimizers, config, train_loader=loader, run_dir=tmp_path, console=console
        )
        monkeypatch.setattr(trainer, "lr", lambda: LR)
        step = trainer.train_step
        monkeypatch.setattr(step, "loss_fn", console.around("forward", step.loss_fn))
        monkeypatch.setattr(Tensor, "backward", console.around("backward", Tensor.backward))
        for optimizer in trainer.train_step.optimizers:
            name = f"optimizer {type(optimizer).__name__}"
            monkeypatch.setattr(optimizer, "step", console.around(name, optimizer.step))
        try:
            benchmark.pedantic(trainer.fit, rounds=1, iterations=1)
        finally:
            trainer.close()
            console.close()
    figures = comparison(console.times)
    total_s = sum(console.times[OURS]) * N_STEPS
    spent = dict(console.spent_s) | {"data wait": loader.wait_s}  # that of the warm-up too
    shares = {name: seconds / total_s for name, seconds in spent.items()}
    shares["rest"] = 1 - sum(shares.values())
    pairs = zip(*console.times.values(), strict=True)
    overhead = statistics.median((own - bare) / own for own, bare in pairs)
    benchmark.extra_info.update(figures, share_of_step=shares, overhead=overhead, n_calls=N_STEPS)
