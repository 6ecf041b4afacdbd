"""A training step against the same model in plain torch, and against ours in other settings.

``fasttrain`` is the trainer's step by default: forward, backward, norm, verdict, update, compiled
as ``run.compile = "auto"`` does. ``torch`` is the same model from torch's own functions, and
``torch.compile`` that, compiled as one graph: see steps.py. All start from the same parameters and
train on the same batch. None may be faster than ``auto`` by more than noise, or the test fails;
with ``--full`` neither in the other precision, where the device multiplies bf16 natively.

On a GPU large configs are timed and profiled, with the trainer's loader: with fp8 too, MFU is of
the peak of bf16.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fasttrain_kernels._torch import native_bf16

from benchmarks import harness, steps
from benchmarks.harness import CUDA, OURS
from benchmarks.steps import (
    BASE,
    GPT2_CHARS,
    LLAMA_LIKE,
    LR,
    TINY,
    Step,
    config_of,
)
from benchmarks.store import ROOT, slug
from fasttrain.config import UserError
from fasttrain.data.loader import Loader
from fasttrain.data.order import LoaderOptions
from fasttrain.engine.step import TrainStep
from fasttrain.log import metrics

SHAPES: dict[str, tuple[dict[str, Any], Path | None]] = {
    "gpt2-chars": (GPT2_CHARS, None),
    "llama-256": (LLAMA_LIKE, None),
    # Not with its own optimizer, Muon: torch has none that is fast on a CPU.
    "base": ({"model.vocab_size": 2048, "optim.name": "adamw"}, BASE),
}
NOISE = 0.05  # by which a median of the ratios in a round may be off


@pytest.mark.parametrize("name", SHAPES)
def test_training_step(compare: Any, benchmark: Any, full: bool, rehearse: bool, name: str) -> None:
    if name == "llama-256" and not full:
        pytest.skip("compiles for most of a minute: --full")
    torch._dynamo.reset()
    overrides, file = SHAPES[name]
    config = config_of(overrides, file)
    device = steps.resolve_device("auto")
    own, left_out = steps.resolve_precision("auto", device).name, {}
    ways = {OURS: steps.our_step(config)}
    for dtype in ("fp32", "bf16"):
        if dtype != own and not (full and native_bf16(device)):
            left_out[dtype] = "--full" if native_bf16(device) else "this device emulates it"
            continue

        def step(make: Callable[..., Step], compiled: str, dtype: str = dtype) -> Step:
            return make(config_of(overrides | {"run.dtype": dtype, "run.compile": compiled}, file))

        ways |= {
            f"fasttrain {dtype}": step(steps.our_step, "off"),
            f"fasttrain compiled, {dtype}": step(steps.our_step, "default"),
            f"torch {dtype}": step(steps.plain_step, "off"),
            f"torch.compile {dtype}": step(steps.plain_step, "default"),
        }
    for _ in range(3):  # the same losses, update for update; and compilation is over
        losses = {way: step().item() for way, step in ways.items()}
    tolerance = 2e-3 if own == "fp32" and "torch bf16" not in ways else 2e-2
    exact = next(loss for way, loss in losses.items() if way.startswith("torch "))
    assert all(abs(loss - exact) <= tolerance * exact for loss in losses.values()), losses
    n_tokens = config.train.micro_batch * config.data.seq_len
    options = {"n_calls": 3 if name == "gpt2-chars" else 1, "warmup": 1, "flush": False}
    compare(ways, left_out=left_out, per_call={"tokens_per_s": n_tokens}, **options)
    speedup = benchmark.extra_info["speedup"]
    assert rehearse or min(speedup.values()) >= 1 - NOISE, f"auto is not the fastest: {speedup}"


def figures(suite: str, name: str) -> Any:
    """Return a parameter with the suite and the name of its figures."""
    return pytest.param(name, marks=pytest.mark.figures(suite, name=name), id=name)


# ---- large configs, with the loader and a profile ------------------------------------------------

# One micro-batch a step.
FIXED = {
    "train.tokens_per_step": "none", "data.path": "none-here", "checkpoint.every_steps": "none"
}  # fmt: skip
CONFIGS = {
    "gpt2-124m bf16": {"run.dtype": "bf16"},
    "llama-1b bf16": {"run.dtype": "bf16"},
    "llama-1b fp8": {"run.fp8": "true"},
}
# What stands in for them on a CPU.
SMALL = TINY | {"model.n_kv_heads": "none", "model.hidden_dim": 128, "run.fp8": "false"}
N_TOKENS, N_PROFILED, N_TOP = 4_000_000, 3, 12
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def summarize(events: Iterable[Mapping[str, Any]], n_steps: int) -> dict[str, Any]:
    """Return figures for each step of a chrome trace that covers ``n_steps`` of them.

    ``busy_ms`` is the time of a step in which at least one kernel or copy ran, ``longest_gap_us``
    the longest in which none did. All are None where nothing ran on a device.
    """
    spans: list[tuple[float, float]] = []
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in ON_DEVICE:
            started, lasted = float(event["ts"]), float(event["dur"])
            spans.append((started, started + lasted))
            by_name[str(event["name"])].append(lasted)
    if not spans:
        return dict.fromkeys(("launches_per_step", "busy_ms", "longest_gap_us", "top_kernels"))
    busy, longest, reached = 0.0, 0.0, min(spans)[0]
    for start, end in sorted(spans):  # streams overlap: the union counts
        longest = max(longest, start - reached)
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    top = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:N_TOP]
    return {
        "launches_per_step": len(spans) / n_steps,
        "busy_ms": busy / n_steps / 1e3,
        "longest_gap_us": longest,
        "top_kernels": [
            {"name": name[:120], "ms": sum(ms) / n_steps / 1e3, "launches": len(ms) / n_steps}
            for name, ms in top
        ],
    }


def profile(step: Callable[[], object], path: Path) -> dict[str, Any]:
    """Return the summary of some profiled steps."""
    with torch.profiler.profile(acc_events=True) as profiler:
        for _ in range(N_PROFILED):
            step()
        harness.synchronize()
    profiler.export_chrome_trace(str(path))
    return summarize(json.loads(path.read_text("utf-8"))["traceEvents"], N_PROFILED)


@pytest.mark.parametrize("name", [figures(f"step-{slug(name)}", name) for name in CONFIGS])
def test_config(compare: Any, benchmark: Any, rehearse: bool, tmp_path: Path, name: str) -> None:
    if not CUDA and not rehearse:
        pytest.skip("needs a CUDA device")
    torch._dynamo.reset()
    file = ROOT / "configs" / f"{name.split()[0]}.toml"
    config = config_of(FIXED | CONFIGS[name] | ({} if CUDA else SMALL), file)
    rows, seq_len, vocab = config.train.micro_batch, config.data.seq_len, config.model.vocab_size
    dtype = np.uint16 if vocab <= 2**16 else np.uint32
    ids = np.random.default_rng(0).integers(vocab, size=N_TOKENS, dtype=dtype)
    sizes = LoaderOptions(seq_len=seq_len, micro_batch=rows)
    model, optimizers, device, precision = steps.parts_of(config)
    try:
        step = TrainStep(model, optimizers, config, device=device, precision=precision)
    except UserError as error:  # fp8 without what it needs
        pytest.skip(str(error))
    calls, found = 0, {"parameters": model.num_parameters(), "rows": rows, "seq_len": seq_len}
    with Loader(steps.dataset_of(tmp_path, ids, vocab), sizes, device=device) as loader:

        def call() -> None:
            nonlocal calls
            calls += 1
            step([next(loader)], LR)

        for _ in range(3):  # compilation, and the optimizer's state
            call()
        loss = step.loss.item()
        assert math.isfinite(loss), f"the loss of a step is {loss}"
        waited, calls = loader.wait_s, 0
        rates = {"tokens_per_s": rows * seq_len}
        median_s = compare({OURS: call}, n_calls=10, warmup=1, flush=False, per_call=rates)[OURS]
        found["data_wait_ms"] = 1e3 * (loader.wait_s - waited) / calls
        found |= profile(call, tmp_path / "trace.json")
    flops = model.flops_per_token()
    rate, ceiling = rows * seq_len / median_s, harness.ceilings()["matmul_tflop_per_s"] * 1e12
    peak = metrics.peak_flops(device, precision.name)
    if found["busy_ms"] is not None:
        # The profiler slows the host down: the gaps that count are those without it.
        found["idle_fraction"] = max(0.0, 1 - found["busy_ms"] / 1e3 / median_s)
    benchmark.extra_info.update(
        found,
        precision="fp8" if config.run.fp8 else precision.name,
        compile=step.compile_mode,
        loss=loss,
        mfu_of_measured_ceiling=rate * flops / ceiling,
        mfu_of_datasheet=metrics.mfu(rate, flops, peak),
        peak_memory_gib=metrics.peak_memory_gib(device),
    )
