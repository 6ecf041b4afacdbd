"""One stage of `benchmarks.gpu`: a training step of a config on the device, timed and profiled.

    python -m benchmarks.gpu_step configs/gpt2-124m.toml --name gpt2-124m --results DIR

Random tokens come from a file through the trainer's loader. With fp8 too, MFU is of the peak
of bf16. The figures are written after each part: a run that is cut off keeps what it had. A batch
too large for the memory is halved. With ``device`` as config: what the device is, and its ceilings.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness, store
from benchmarks.harness import OURS
from benchmarks.steps import LR, TINY, dataset_of, parts_of
from fasttrain.config import TrainConfig, load_config
from fasttrain.data.loader import Loader
from fasttrain.data.order import LoaderOptions
from fasttrain.device import resolve_device
from fasttrain.engine.memory import release_memory
from fasttrain.engine.step import TrainStep
from fasttrain.log import metrics
from fasttrain.model.transformer import flops_constants

ROUNDS, N_CALLS, N_PROFILED, N_TOP = 5, 10, 3, 12
N_TOKENS = 4_000_000
Figures = dict[str, Any]
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
# What stands in for a model too large for a CPU.
SMALL = (
    *(f"{key}={value}" for key, value in TINY.items()),
    *("model.n_kv_heads=none", "model.hidden_dim=128", "run.fp8=false"),
)


def device_facts() -> Figures:
    """Return the device's properties that a reader of the figures needs."""
    if not harness.CUDA:
        return {}
    found = torch.cuda.get_device_properties(0)
    return {
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": found.total_memory / 2**30,
        "l2_mib": found.L2_cache_size / 2**20,
    }


# ---- a profiler's trace --------------------------------------------------------------------------


def summarize(events: Iterable[Mapping[str, Any]], n_steps: int) -> Figures:
    """Return figures for each step of a chrome trace that covers ``n_steps`` of them.

    ``busy_ms`` is the time of a step in which at least one kernel or copy ran, ``span_ms`` that
    from the first to the last, and ``gap_fraction`` the idle part of the span. All are None where
    nothing ran on a device.
    """
    spans: list[tuple[float, float]] = []
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in ON_DEVICE:
            started, lasted = float(event["ts"]), float(event["dur"])
            spans.append((started, started + lasted))
            by_name[str(event["name"])].append(lasted)
    if not spans:
        keys = ("launches_per_step", "busy_ms", "span_ms", "gap_fraction", "longest_gap_us")
        return dict.fromkeys((*keys, "top_kernels"))
    spans.sort()
    busy, longest, first = 0.0, 0.0, spans[0][0]
    reached = first
    for start, end in spans:  # streams overlap: the union counts
        longest = max(longest, start - reached)
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    span = reached - first
    top = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:N_TOP]
    return {
        "launches_per_step": len(spans) / n_steps,
        "busy_ms": busy / n_steps / 1e3,
        "span_ms": span / n_steps / 1e3,
        "gap_fraction": 1 - busy / span if span else 0.0,
        "longest_gap_us": longest,
        "top_kernels": [
            {"name": name[:120], "ms": sum(ms) / n_steps / 1e3, "launches": len(ms) / n_steps}
            for name, ms in top
        ],
    }


def profile(step: Callable[[], object], n_steps: int, path: Path) -> Figures:
    """Profile ``n_steps`` steps, write the chrome trace to ``path`` and return its summary."""
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, kinds.CUDA] if harness.CUDA else [kinds.CPU]
    harness.synchronize()
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(n_steps):
            step()
        harness.synchronize()
    profiler.export_chrome_trace(str(path))
    return summarize(json.loads(path.read_text("utf-8"))["traceEvents"], n_steps)


# ---- the step ------------------------------------------------------------------------------------


def loader_of(config: TrainConfig, folder: Path) -> Loader:
    """Return the loader of ``config`` over random tokens in ``folder``."""
    vocab, device = config.model.vocab_size, resolve_device(config.run.device)
    dtype = np.uint16 if vocab <= 2**16 else np.uint32
    ids = np.random.default_rng(0).integers(vocab, size=N_TOKENS, dtype=dtype)
    dataset = dataset_of(folder, ids, vocab)
    sizes = {"seq_len": config.data.seq_len, "micro_batch": config.train.micro_batch}
    return Loader(dataset, LoaderOptions(**sizes), device=device)


def run(load: Callable[..., TrainConfig], save: Callable[[Figures], None], trace: Path) -> Figures:
    """Measure, calling ``save`` with all figures so far after each part; return them."""
    config = load()
    rows, seq_len = config.train.micro_batch, config.data.seq_len
    with tempfile.TemporaryDirectory() as folder:
        while True:
            config = load(f"train.micro_batch={rows}")
            loader = loader_of(config, Path(folder))
            model, optimizers, device, precision = parts_of(config)
            train_step = TrainStep(model, optimizers, config, device=device, precision=precision)
            started = time.perf_counter()
            try:
                for _ in range(3):  # compilation, and the optimizer's state
                    train_step([next(loader)], LR)
                loss = train_step.loss.item()
                break
            except torch.cuda.OutOfMemoryError:
                if rows == 1:
                    raise
                loader.close()
            del model, optimizers, train_step
            torch._dynamo.reset()
            release_memory()
            rows //= 2
        assert math.isfinite(loss), f"the loss of a step is {loss}"
        entry: Figures = {
            "parameters": model.num_parameters(),
            "rows": rows,
            "seq_len": seq_len,
            "precision": "fp8" if config.run.fp8 else precision.name,
            "compile": train_step.compile_mode,
            "first_three_steps_s": time.perf_counter() - started,
            "loss": loss,
        }
        save(entry)

        def step() -> None:
            train_step([next(loader)], LR)

        waited, times = loader.wait_s, []
        flops = metrics.flops_per_token(**flops_constants(model), seq_len=seq_len)
        ceiling = harness.ceilings()["matmul_tflop_per_s"] * 1e12
        peak = metrics.peak_flops(device, precision.name)
        for turn in range(ROUNDS):
            times.append(harness.seconds(step, N_CALLS, flush=False))
            entry |= harness.comparison({OURS: times})
            rate = rows * seq_len / entry["median_s"][OURS]
            entry |= {
                "tokens_per_s": {OURS: rate},
                "mfu_of_measured_ceiling": rate * flops / ceiling,
                "mfu_of_datasheet": metrics.mfu(rate, flops, peak),
                "peak_memory_gib": metrics.peak_memory_gib(device),
                "data_wait_ms": 1e3 * (loader.wait_s - waited) / N_CALLS / (turn + 1),
            }
            save(entry)
        entry |= profile(step, N_PROFILED, trace)
        if entry["busy_ms"] is not None:
            # The profiler slows the host down: the gaps that count are those without it.
            entry["idle_fraction"] = max(0.0, 1 - entry["busy_ms"] / 1e3 / entry["median_s"][OURS])
        save(entry)
        loader.close()
    return entry


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one config and print the figures."""
    parser = argparse.ArgumentParser(description="Time and profile a training step.")
    parser.add_argument("config", type=Path, help="a file, or `device`")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--name", default="device", help="of the figures, and of their file")
    parser.add_argument("--results", type=Path, required=True, help="folder of the JSON file")
    parser.add_argument("--traces", type=Path, default=Path("."), help="folder of the trace")
    arguments = parser.parse_intermixed_args(argv)
    machine, ceilings = harness.machine(), harness.ceilings()
    suite = "device" if arguments.name == "device" else f"step-{store.slug(arguments.name)}"

    def save(entry: Figures) -> None:
        entry = {"name": arguments.name} | entry
        store.save(arguments.results, store.document(suite, [entry], machine, ceilings))

    if str(arguments.config) == "device":
        save(device_facts())
        print(machine, ceilings, device_facts(), sep="\n")
        return 0
    # One micro-batch a step.
    fixed = ["train.tokens_per_step=none", "data.path=none-here", "checkpoint.every_steps=none"]
    fixed += [*arguments.overrides, *(() if harness.CUDA else SMALL)]
    arguments.traces.mkdir(parents=True, exist_ok=True)
    trace = arguments.traces / f"{suite}.trace.json"
    entry = run(lambda *more: load_config(arguments.config, [*fixed, *more]), save, trace)
    print(arguments.name, json.dumps(entry | {"times_s": None}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
