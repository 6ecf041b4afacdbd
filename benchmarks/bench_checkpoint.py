"""How long a save holds the training thread, beside torch.save and one plain copy of the bytes.

Saved are fp32 parameters and two AdamW moments of each: 120M parameters (1.44 GB) on a GPU, 30M
on a CPU. The ways take turns within a round; ratios are medians over rounds of those in a round.
`slowdown` is the time of a step (two matrix products, on every thread of a CPU) while the
background thread writes, over its time in the same round with nothing else to do.
"""

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.checkpoint import CheckpointWriter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N_PARAMETERS = 120_000_000 if DEVICE.type == "cuda" else 30_000_000
ROUNDS = 5
Groups = dict[str, dict[str, Tensor]]


def make_groups() -> Groups:
    """Tensors shaped as those of a GPT-2-like model: matrices of 4·dim × dim and small vectors."""
    dim = 64 * round(math.sqrt(N_PARAMETERS / 48) / 64)
    shapes = [(4 * dim, dim)] * (N_PARAMETERS // (4 * dim * dim)) + [(dim,)] * 48
    model = {f"w{i}": torch.randn(shape, device=DEVICE) for i, shape in enumerate(shapes)}
    moments = {f"{n}.{m}": t.square() for n, t in model.items() for m in ("exp_avg", "exp_avg_sq")}
    return {"model": model, "optimizer": moments}


def timed(call: Callable[[], object]) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def test_stall_of_a_save(benchmark: Any, tmp_path: Path) -> None:
    groups = make_groups()
    tensors = [tensor for group in groups.values() for tensor in group.values()]
    pinned = DEVICE.type == "cuda"
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=pinned) for t in tensors]
    writer = CheckpointWriter(tmp_path / "checkpoints", keep_last=1)
    a = torch.randn(1024, 1024, device=DEVICE)
    product = torch.empty_like(a)
    times: dict[str, list[float]] = {}

    def copy() -> None:
        for mine, tensor in zip(copies, tensors, strict=True):
            mine.copy_(tensor, non_blocking=True)

    def step() -> None:
        torch.mm(a, a, out=product)
        torch.mm(a, a, out=product)

    def record(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)

    def before_a_save() -> None:
        writer.wait()
        record("plain copy", timed(copy))
        record("torch.save", timed(lambda: torch.save(groups, tmp_path / "torch.pt")))
        record("step", statistics.median(timed(step) for _ in range(20)))

    def save() -> None:
        record("save", timed(lambda: writer.save(1, groups, {}, "")))

    def after_a_save() -> None:
        started, during = time.perf_counter(), []
        while writer._thread is not None and writer._thread.is_alive():
            during.append(timed(step))
            if time.perf_counter() - started > 3:  # on busy cores training goes first
                break
        record("step while writing", statistics.median(during) if during else times["step"][-1])
        writer.wait()
        record("commit", times["save"][-1] + time.perf_counter() - started)

    before_a_save()
    save()  # allocates the buffers
    after_a_save()
    times.clear()
    benchmark.pedantic(
        save, setup=before_a_save, teardown=after_a_save, rounds=ROUNDS, iterations=1
    )

    def ratio(one: str, other: str) -> float:
        return statistics.median(x / y for x, y in zip(times[one], times[other], strict=True))

    benchmark.extra_info.update(
        median_s={name: statistics.median(values) for name, values in times.items()},
        gigabytes=sum(tensor.nbytes for tensor in tensors) / 1e9,
        stall_per_plain_copy=ratio("save", "plain copy"),
        torch_save_per_stall=ratio("torch.save", "save"),
        slowdown=ratio("step while writing", "step"),
    )
    print("", *(f"{key}: {value}" for key, value in benchmark.extra_info.items()), sep="\n  ")
    assert ratio("save", "plain copy") < 1.2
