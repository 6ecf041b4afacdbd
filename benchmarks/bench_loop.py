"""Where the time of the trainer's loop goes at configs/base.toml, and what the loop itself costs.

The trainer runs with its loader, log and run folder. After every few of its steps the bare model
runs as many: the same loss, compiled or not as the trainer's is, its backward pass and the same
optimizers on one batch of the same text, of the same length throughout.
`overhead` is the trainer's time from step to step less the bare model's, as a part of it. The
shares come from clocks around the calls inside the trainer's own steps.
"""

import statistics
import sysconfig
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
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from benchmarks.measure import comparison
from benchmarks.subject import BASE, LR, make_model
from fasttrain.config import TrainConfig, load_config
from fasttrain.data.format import open_dataset
from fasttrain.data.loader import Batch, Loader
from fasttrain.device import resolve_device, resolve_precision
from fasttrain.engine.optim import build_optimizers
from fasttrain.engine.trainer import Trainer
from fasttrain.log.console import Console
from fasttrain.model.runtime import compile_function, prepare_blocks, resolve_compile

ROUNDS, FULL_ROUNDS, N_STEPS, N_WARM = 12, 40, 2, 4


def text_as_tokens(folder: Path, vocab_size: int) -> None:
    """Write bytes of the standard library as splits: real text, and no tokenizer to train."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    ids = np.frombuffer(b"".join(p.read_bytes() for p in sources[:100]), np.uint8)
    for split in ("train", "val"):
        (ids.astype(np.uint16) % vocab_size).tofile(folder / f"{split}.bin")


def bare_step(config: TrainConfig, batch: Batch) -> Callable[[], Tensor]:
    """Return forward, backward and optimizers alone, compiled as the trainer compiles."""
    model = make_model(config)
    device = resolve_device(config.run.device)
    precision = resolve_precision(config.run.dtype, device)
    optimizers = build_optimizers(model, config.optim, precision.compute)

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        with precision.autocast():
            loss = linear_cross_entropy(model.hidden(tokens), model.head_weight, targets)
        assert isinstance(loss, Tensor)
        return loss

    mode = resolve_compile(config, device)
    prepare_blocks(model, activation_checkpointing="none", mode=mode, sharded=False)
    fn = loss_of if mode in ("off", "c++") else compile_function(loss_of, mode)

    def step() -> Tensor:
        loss = fn(batch.tokens, batch.targets)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


class Clocks:
    """Adds up the time inside the loss, the backward pass and the optimizers of a trainer."""

    def __init__(self, trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spent_s: Counter[str] = Counter()
        self.mine = {id(optimizer) for optimizer in trainer.optimizers}
        step = trainer.train_step
        monkeypatch.setattr(step, "loss_fn", self.around("forward", step.loss_fn))
        monkeypatch.setattr(Tensor, "backward", self.around("backward", Tensor.backward))
        self.handles = [
            register_optimizer_step_pre_hook(lambda optimizer, *_: self.begin(optimizer)),
            register_optimizer_step_post_hook(lambda optimizer, *_: self.end(optimizer)),
        ]
        self.paused = True  # in warm-up, and while the bare model runs

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                if not self.paused:
                    self.spent_s[name] += time.perf_counter() - started

        return timed

    def begin(self, optimizer: object) -> None:
        self.started = time.perf_counter()

    def end(self, optimizer: object) -> None:
        if id(optimizer) in self.mine:
            name = f"optimizer {type(optimizer).__name__}"
            self.spent_s[name] += 0 if self.paused else time.perf_counter() - self.started


class Turns(Console):
    """Takes the time from step to step, and lets the bare model run in between."""

    def __init__(self, log_file: Path, bare: Callable[[], Tensor]) -> None:
        super().__init__(log_file=log_file, interactive=False)
        self.bare = bare
        self.times: dict[str, list[float]] = {"fasttrain": [], "bare model": []}
        self.clocks: Clocks | None = None

    def progress(self, step: int, *rest: Any) -> None:
        super().progress(step, *rest)
        if step % N_STEPS:
            return
        assert self.clocks is not None
        ended = time.perf_counter()
        self.clocks.paused = True
        for _ in range(N_STEPS):
            self.bare()
        resumed = time.perf_counter()
        if step > N_WARM:
            self.times["fasttrain"].append((ended - self.resumed) / N_STEPS)
            self.times["bare model"].append((resumed - ended) / N_STEPS)
        self.clocks.paused = False
        self.resumed = resumed


@pytest.mark.skipif(torch.cuda.is_available(), reason="clocks around calls time the host alone")
def test_loop(benchmark: Any, full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    n_steps = N_WARM + (FULL_ROUNDS if full else ROUNDS) * N_STEPS
    overrides = [f"data.path={tmp_path}", "data.dtype=uint16", "model.vocab_size=2048"]
    overrides += [f"train.steps={n_steps}", "eval.every_steps=none", "eval.prompts=[]"]
    overrides += ["eval.sample_every_steps=none", "checkpoint.every_steps=none"]
    config = load_config(BASE, overrides)
    text_as_tokens(tmp_path, 2048)
    dataset = open_dataset(
        tmp_path, "train", dtype="uint16", vocab_size=2048, cache_dir=tmp_path / "cache"
    )
    device = resolve_device(config.run.device)
    rows, seq_len = config.train.micro_batch, config.data.seq_len
    loaded = {"seq_len": seq_len, "micro_batch": rows, "seed": 0, "device": device}
    with Loader(dataset, **loaded) as loader:
        bare = bare_step(config, next(loader))
    console = Turns(tmp_path / "log", bare)
    with Loader(dataset, **loaded) as loader:
        model = make_model(config)
        compute = resolve_precision(config.run.dtype, device).compute
        optimizers = build_optimizers(model, config.optim, compute)
        trainer = Trainer(
            model,
            optimizers,
            config,
            train_loader=loader,
            run_dir=tmp_path,
            console=console,
        )
        monkeypatch.setattr(trainer, "lr", lambda: LR)
        console.clocks = clocks = Clocks(trainer, monkeypatch)
        try:
            benchmark.pedantic(trainer.fit, rounds=1, iterations=1)
        finally:
            for handle in clocks.handles:
                handle.remove()
            trainer.close()
            console.close()
    figures = comparison(console.times)
    total_s = sum(console.times["fasttrain"]) * N_STEPS
    spent = dict(clocks.spent_s) | {"data wait": loader.wait_s}  # that of the warm-up too
    shares = {name: seconds / total_s for name, seconds in spent.items()}
    shares["rest"] = 1 - sum(shares.values())
    overhead = statistics.median(
        (own - bare) / own
        for own, bare in zip(console.times["fasttrain"], console.times["bare model"], strict=True)
    )
    benchmark.extra_info.update(figures, share_of_step=shares, overhead=overhead, n_calls=N_STEPS)
