"""fasttrain.log.metrics: FLOPs, utilisation, the smoothed loss, peak memory."""

import json
import math
from pathlib import Path

import pytest
import torch

from fasttrain.log import metrics
from fasttrain.log.metrics import mfu, peak_flops, peak_memory_gib, smoothed


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5e12),
        ("NVIDIA H100 80GB HBM3", "tf32", 494.5e12),
        ("NVIDIA H100 PCIe", "fp16", 756e12),
        ("NVIDIA H100 NVL", "bf16", 835.5e12),
        ("NVIDIA H200", "bf16", 989.5e12),
        ("NVIDIA GH200 480GB", "bf16", 989.5e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100 80GB PCIe", "tf32", 156e12),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40", "bf16", 181e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2e12),
        ("Tesla T4", "fp16", 65e12),
        ("Tesla T4", "bf16", None),  # Turing multiplies neither bf16 nor TF32
        ("Tesla V100-SXM2-16GB", "tf32", None),
    ],
)
def test_peak_of_known_devices(
    name: str, dtype: str, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda"), dtype) == expected


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",  # a slice of the chip
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H20",
        "NVIDIA A100X",
        "AMD Instinct MI300X",
        "NVIDIA L4000",
        "",
    ],
)
def test_a_similar_name_is_not_enough(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    for dtype in ("bf16", "fp16", "tf32", "fp32"):
        assert peak_flops(torch.device("cuda"), dtype) is None


def test_peak_falls_with_precision_on_every_device() -> None:
    for _, half, tf32, single in metrics._PEAK_TFLOPS:
        assert half > (tf32 or single) >= single
        assert tf32 is None or half == pytest.approx(2 * tf32, rel=0.03)


def test_peak_of_a_cpu_is_unknown() -> None:
    assert peak_flops(torch.device("cpu"), "bf16") is None


def test_mfu() -> None:
    assert mfu(1000.0, 5e9, 1e13) == pytest.approx(0.5)
    assert mfu(1000.0, 5e9, 2e13) == pytest.approx(0.25)
    assert mfu(1000.0, 5e9, None) is None


def test_the_smoothed_loss_starts_at_the_first_and_follows() -> None:
    assert smoothed(None, 4.0) == 4.0
    assert smoothed(4.0, 2.0) == pytest.approx(3.8)
    assert smoothed(3.8, 2.0) == pytest.approx(3.62)


def test_the_smoothed_loss_leaves_out_what_is_not_finite() -> None:
    assert smoothed(None, math.nan) is None
    assert smoothed(3.0, math.inf) == 3.0
    assert smoothed(3.0, math.nan) == 3.0


def test_peak_memory_of_the_process_rises_with_use() -> None:
    before = peak_memory_gib(torch.device("cpu"))
    assert 0.01 < before < 1024
    used = torch.ones(int((before + 0.05) * 2**30 / 8), dtype=torch.float64)
    after = peak_memory_gib(torch.device("cpu"))
    assert after >= before + 0.04
    assert used[-1] == 1.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_peak_memory_of_a_gpu_is_that_of_its_tensors() -> None:
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats(device)
    before = peak_memory_gib(device)
    block = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert peak_memory_gib(device) >= before + 0.25
    del block
    assert peak_memory_gib(device) >= before + 0.25  # the peak, not what is held now


def test_training_metrics_are_averaged_summed_up_and_written(tmp_path: Path) -> None:
    found = metrics.TrainingMetrics()
    for step in range(1, 151):
        found.record(step, loss=float(step), lr=0.1 / step)
    found.record(150, val_loss=math.nan)
    found.record(150, val_loss=2.5)
    assert found.moving_average("loss", 3)[:4] == [1.0, 1.5, 2.0, 3.0]
    summary = {"steps": 150, "loss": 100.5, "best_val_loss": 2.5, "lr": 0.1 / 150}
    assert found.summary() == pytest.approx(summary)  # the loss: the mean of 51 to 150
    found.to_jsonl(tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 152
    assert rows[-2] == {"step": 150, "val_loss": None}
    found.to_csv(tmp_path / "rows.csv")
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert lines[:2] == ["step,loss,lr,val_loss", "1,1.0,0.1,"]
    with pytest.raises(ValueError, match=r"window .*\b1\b.*\b0\b"):
        found.moving_average("loss", 0)
