"""One stage of `benchmarks.gpu`: a training step of a config on the device, timed and profiled.

    python -m benchmarks.gpu_step configs/gpt2-124m.toml --name gpt2-124m --results DIR

Random tokens come from a file through the trainer's loader. With fp8 too, MFU is of the peak
of bf16. The figures are written after each part: a run that is cut off keeps what it had. A batch
too large for the memory is halved.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import measure, store
from benchmarks.subject import LR, make_model
from benchmarks.trace import profile
from fasttrain.config import TrainConfig, load_config
from fasttrain.data.format import open_dataset
from fasttrain.data.loader import Loader
from fasttrain.device import resolve_device, resolve_precision
from fasttrain.engine.memory import release_memory
from fasttrain.engine.optim import build_optimizers
from fasttrain.engine.step import TrainStep
from fasttrain.log import metrics
from fasttrain.model.transformer import flops_constants

ROUNDS, N_CALLS, N_PROFILED = 5, 10, 3
N_TOKENS = 4_000_000
# What stands in for a model too large for a CPU, so that every line runs there.
TINY = (
    *("model.vocab_size=512", "model.dim=64", "model.n_layers=2", "model.n_heads=4"),
    *("model.n_kv_heads=none", "model.hidden_dim=128", "data.seq_len=32", "train.micro_batch=2"),
)


def random_tokens(folder: Path, config: TrainConfig) -> None:
    """Write splits of random tokens, without a header, as nanoGPT has them."""
    vocabulary = config.model.vocab_size
    assert vocabulary is not None
    dtype = np.uint16 if vocabulary <= 2**16 else np.uint32
    ids = np.random.default_rng(0).integers(0, vocabulary, N_TOKENS, dtype=dtype)
    for split in ("train", "val"):
        ids.tofile(folder / f"{split}.bin")


class Subject:
    """The trainer's step of ``config``, with its loader over the tokens in ``folder``."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        device = resolve_device(config.run.device)
        precision = resolve_precision(config.run.dtype, device)
        vocabulary = config.model.vocab_size
        assert vocabulary is not None
        dataset = open_dataset(
            folder,
            "train",
            dtype="uint16" if vocabulary <= 2**16 else "uint32",
            vocab_size=vocabulary,
            cache_dir=folder / "cache",
        )
        self.config, self.precision = config, precision
        self.loader = Loader(
            dataset,
            seq_len=config.data.seq_len,
            micro_batch=config.train.micro_batch,
            seed=0,
            device=device,
        )
        self.model = make_model(config)
        optimizers = build_optimizers(self.model, config.optim, precision.compute)
        self.train_step = TrainStep(
            self.model, optimizers, config, device=device, precision=precision
        )
        self.tokens = config.train.micro_batch * config.data.seq_len

    def step(self) -> None:
        """Run one step."""
        self.train_step([next(self.loader)], LR)

    def figures(self, times_s: Sequence[float]) -> dict[str, Any]:
        """Return throughput and utilisation for the times of a step, one for each round."""
        compared = measure.comparison({"fasttrain": list(times_s)})
        rate = self.tokens / compared["median_s"]["fasttrain"]
        flops = metrics.flops_per_token(
            **flops_constants(self.model), seq_len=self.config.data.seq_len
        )
        device = resolve_device(self.config.run.device)
        ceiling = measure.ceilings()["matmul_tflop_per_s"] * 1e12
        return compared | {
            "tokens_per_s": {"fasttrain": rate},
            "mfu_of_measured_ceiling": rate * flops / ceiling,
            "mfu_of_datasheet": metrics.mfu(
                rate, flops, metrics.peak_flops(device, self.precision.name)
            ),
            "peak_memory_gib": metrics.peak_memory_gib(device),
        }


def load(path: Path, overrides: Sequence[str], rows: int | None) -> TrainConfig:
    """Return the config for a bench: one micro-batch a step, at most ``rows`` of it."""
    fixed = ["train.tokens_per_step=none", "data.path=none-here", "checkpoint.every_steps=none"]
    config = load_config(path, [*fixed, *overrides])
    if rows is not None:
        config = load_config(path, [*fixed, *overrides, f"train.micro_batch={rows}"])
    return config


def run(
    path: Path,
    overrides: Sequence[str],
    save: Callable[[dict[str, Any]], None],
    trace_path: Path,
    name: str,
) -> dict[str, Any]:
    """Measure, calling ``save`` with all figures so far after each part; return them."""
    config = load(path, overrides, None)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        random_tokens(folder, config)
        rows = config.train.micro_batch
        while True:
            subject = Subject(load(path, overrides, rows), folder)
            started = time.perf_counter()
            try:
                for _ in range(3):  # compilation, and the optimizer's state
                    subject.step()
                loss = subject.train_step.loss.item()
                break
            except torch.cuda.OutOfMemoryError:
                if rows == 1:
                    raise
                subject.loader.close()
            del subject
            torch._dynamo.reset()
            release_memory()
            rows //= 2
        assert math.isfinite(loss), f"the loss of a step is {loss}"
        entry: dict[str, Any] = {
            "name": name,
            "parameters": subject.model.num_parameters(),
            "rows": rows,
            "seq_len": config.data.seq_len,
            "precision": "fp8" if subject.config.run.fp8 else subject.precision.name,
            "compile": subject.train_step.compile_mode,
            "first_three_steps_s": time.perf_counter() - started,
            "loss": loss,
        }
        save(entry)
        waited, n_steps, times = subject.loader.wait_s, 0, []
        for _ in range(ROUNDS):
            times.append(measure.seconds(subject.step, N_CALLS, flush=False))
            n_steps += N_CALLS
            entry |= subject.figures(times)
            entry["data_wait_ms"] = 1e3 * (subject.loader.wait_s - waited) / n_steps
            save(entry)
        entry |= profile(subject.step, N_PROFILED, trace_path)
        if entry["busy_ms"] is not None:
            # The profiler slows the host down: the gaps that count are those without it.
            entry["idle_fraction"] = max(
                0.0, 1 - entry["busy_ms"] / 1e3 / entry["median_s"]["fasttrain"]
            )
        save(entry)
        subject.loader.close()
    return entry


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one config and print the figures."""
    parser = argparse.ArgumentParser(description="Time and profile a training step.")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--name", required=True, help="of the figures, and of their file")
    parser.add_argument("--results", type=Path, required=True, help="folder of the JSON file")
    parser.add_argument("--traces", type=Path, required=True, help="folder of the trace")
    arguments = parser.parse_intermixed_args(argv)
    overrides = list(arguments.overrides)
    if not torch.cuda.is_available():
        overrides += [*TINY, "run.compile=off", "run.dtype=fp32", "run.fp8=false"]
    suite = "step-" + store.slug(arguments.name)
    machine, ceilings = measure.machine(), measure.ceilings()

    def save(entry: dict[str, Any]) -> None:
        document = store.document(suite, [entry], machine, ceilings)
        store.write(
            arguments.results / store.folder_of(document["machine"]) / f"{suite}.json", document
        )

    arguments.traces.mkdir(parents=True, exist_ok=True)
    trace_path = arguments.traces / f"{suite}.trace.json"
    entry = run(arguments.config, overrides, save, trace_path, arguments.name)
    print(json.dumps({k: v for k, v in entry.items() if k != "times_s"}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
