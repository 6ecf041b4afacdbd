"""What is measured: model FLOPs, their share of the device's peak, a smoothed loss, peak memory.

An unknown device has no peak and so no utilisation: None, never a guess from a similar name.
"""

import csv
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# Dense peaks in TFLOP/s from the maker's datasheets and whitepapers (figures "with sparsity"
# halved): 16-bit products accumulated in fp32 as torch does, TF32, fp32 outside the tensor cores. A
# name must match in full, so that a laptop part, a cut-down part or a MIG slice counts as unknown.
_PEAK_TFLOPS: tuple[tuple[str, float, float | None, float], ...] = (
    (r"NVIDIA B200", 2250.0, 1125.0, 75.0),
    (r"NVIDIA (H200|GH200 \d+GB|H[18]00 80GB HBM3)", 989.5, 494.5, 67.0),
    (r"NVIDIA H[12]00 NVL", 835.5, 417.5, 60.0),
    (r"NVIDIA H100 PCIe", 756.0, 378.0, 51.0),
    (r"NVIDIA A[18]00-(SXM4|PCIE|PCIe)-\d+GB|NVIDIA A[18]00 80GB PCIe", 312.0, 156.0, 19.5),
    (r"NVIDIA A30", 165.0, 82.0, 10.3),
    (r"NVIDIA A40", 149.7, 74.8, 37.4),
    (r"NVIDIA A10", 125.0, 62.5, 31.2),
    (r"NVIDIA L40S", 362.0, 183.0, 91.6),
    (r"NVIDIA L40", 181.0, 90.5, 90.5),
    (r"NVIDIA L4", 121.0, 60.0, 30.3),
    (r"NVIDIA RTX 6000 Ada Generation", 364.2, 182.1, 91.1),
    (r"NVIDIA RTX A6000", 154.8, 77.4, 38.7),
    (r"NVIDIA GeForce RTX 5090", 209.5, 104.8, 104.8),
    (r"NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6),
    (r"NVIDIA GeForce RTX 3090", 71.0, 35.6, 35.6),
    # Tensor cores without TF32, nor bf16
    (r"Tesla V100-SXM2-\d+GB", 125.0, None, 15.7),
    (r"Tesla V100-PCIE-\d+GB", 112.0, None, 14.0),
    (r"Tesla T4", 65.0, None, 8.1),
)


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Return the dense peak of one device in FLOP/s, None where it is not known (every CPU).

    ``dtype``: what the matrix products run in, ``bf16``, ``fp16``, ``tf32`` or ``fp32``.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for pattern, half, tf32, single in _PEAK_TFLOPS:
        if re.fullmatch(pattern, name):
            peaks = {"bf16": tf32 and half, "fp16": half, "tf32": tf32, "fp32": single}
            return (peak := peaks[dtype]) and 1e12 * peak
    return None


def mfu(tokens_per_s: float, flops_per_token: float, peak_flops: float | None) -> float | None:
    """Return the model FLOPs utilisation, a fraction of all devices' peak; None: it is unknown.

    Source: Chowdhery et al. 2022, PaLM (arXiv:2204.02311), section 4.1.
    """
    return None if peak_flops is None else tokens_per_s * flops_per_token / peak_flops


def smoothed(average: float | None, loss: float) -> float | None:
    """Return the moving average of the finite losses before and ``loss``; None: of none yet."""
    if not math.isfinite(loss):
        return average
    return 0.9 * (loss if average is None else average) + (1.0 - 0.9) * loss


def json_line(row: Mapping[str, Any]) -> str:
    """Return a row as a line of JSON, in which a number that is not finite is null."""
    odd = {k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    return json.dumps({**row, **odd}, allow_nan=False) + "\n"


class NormWatch:
    """Sees a gradient explode: its norm is `EXPLODED` times the average of those before.

    A higher one counts as that: an outlier hides no other, a lasting rise is accepted in 25 steps.
    """

    EXPLODED, WARMUP_STEPS = 10.0, 20

    def __init__(self) -> None:
        self._mean, self._n_steps = 0.0, 0

    def update(self, norm: float) -> float | None:
        """Add the norm of a step; return the average before it where the gradient exploded."""
        if not math.isfinite(norm):
            return None
        self._n_steps += 1
        n = self._n_steps - self.WARMUP_STEPS // 2
        if n <= 0:  # a run may begin with norms that never come again
            return None
        usual = self._mean
        limit = self.EXPLODED * usual if usual and self._n_steps > self.WARMUP_STEPS else math.inf
        self._mean += max(1 / n, 0.01) * (min(norm, limit) - usual)  # plain at first, then decaying
        return usual if norm > limit else None


class TrainingMetrics:
    """What was recorded of a training: numbers by name and step.

    Attributes:
        rows: each with its ``step`` and the numbers recorded with it, in order of recording.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def record(self, step: int, **values: float) -> None:
        """Add numbers of a step, such as ``loss``, ``val_loss`` and ``lr``."""
        self.rows.append({"step": step, **values})

    def values(self, name: str) -> list[float]:
        """Return all that was recorded under a name, in order."""
        return [row[name] for row in self.rows if name in row]

    def last(self) -> dict[str, float]:
        """Return the newest value of each name that stands in the newest row."""
        return {k: v for k, v in self.rows[-1].items() if k != "step"} if self.rows else {}

    def mean(self, name: str, *, since_step: int = 0) -> float:
        """Return the mean of what was recorded after a step, nan where there is nothing."""
        found = [row[name] for row in self.rows if name in row and row["step"] > since_step]
        return sum(found) / len(found) if found else math.nan

    def moving_average(self, name: str, window: int = 100) -> list[float]:
        """Return for each value the mean of it and those before it, ``window`` of them at most."""
        if window < 1:
            raise ValueError(f"TrainingMetrics: window must be at least 1, got {window}")
        values = self.values(name)
        ends = range(1, len(values) + 1)
        return [math.fsum(values[max(0, n - window) : n]) / min(n, window) for n in ends]

    def summary(self) -> dict[str, float | None]:
        """Return the mean loss of the last 100 steps, the best validation loss, the present lr."""
        losses, lrs = self.values("loss")[-100:], self.values("lr")
        finite = [v for v in self.values("val_loss") if math.isfinite(v)]
        return {
            "steps": max((row["step"] for row in self.rows), default=0),
            "loss": math.fsum(losses) / len(losses) if losses else None,
            "best_val_loss": min(finite, default=None),
            "lr": lrs[-1] if lrs else None,
        }

    def to_jsonl(self, path: str | Path) -> None:
        """Write a JSON object a row; what is not finite becomes null."""
        Path(path).write_text("".join(map(json_line, self.rows)), encoding="utf-8")

    def to_csv(self, path: str | Path) -> None:
        """Write a table with a column for each name."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names or ["step"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory use in GiB: on CUDA of tensors, elsewhere of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
