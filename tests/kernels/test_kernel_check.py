"""The check of kernels finds a wrong one, and times every path."""

import math
from itertools import islice
from typing import Any

import fasttrain_kernels
import pytest
import torch
from fasttrain_kernels import catalogue
from fasttrain_kernels._torch import fake_tensors
from torch import Tensor

from fasttrain.device import resolve_precision
from fasttrain.preflight import kernels as kernel_check
from fasttrain.preflight.__main__ import main
from fasttrain.preflight.kernels import CHOICES, check_kernels
from fasttrain.preflight.memory import measure_peak

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time each path once, and compile none."""

    def once(run: Any) -> float:
        run()
        return 1.0

    monkeypatch.setattr(kernel_check, "_median_ms", once)
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)


def test_every_operation_is_right_here_and_has_a_choice() -> None:
    reports = list(check_kernels(CPU))
    assert [report.name for report in reports] == list(CHOICES)
    for report in reports:
        assert report.error <= report.tolerance, report
        assert report.error > 0  # it is compared with something else
        compiled = set() if report.name == "adamw" else {"compiled"}
        assert report.ms.keys() == {"ours", "torch"} | compiled


@pytest.mark.parametrize(("dtype", "fault"), [("fp32", 1e-4), ("bf16", 0.05)])
def test_a_wrong_kernel_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dtype: str, fault: float
) -> None:
    right, precision = fasttrain_kernels.swiglu, resolve_precision(dtype, CPU)

    def wrong(gate: Tensor, up: Tensor) -> Tensor:
        return right(gate, up) * (1 + fault)

    monkeypatch.setattr(kernel_check, "resolve_precision", lambda *_: precision)
    monkeypatch.setattr(fasttrain_kernels, "swiglu", wrong)
    monkeypatch.setattr(fasttrain_kernels, "rms_norm", lambda x, w: x * w * math.nan)
    ops = kernel_check._ops
    monkeypatch.setattr(kernel_check, "_ops", lambda *where: islice(ops(*where), 3))
    assert main(["--kernels", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("FAIL")] == [
        "rms_norm",
        "swiglu",
    ]
    assert "compiled 1 ms" in out


def test_times_are_medians_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    runs = []
    ms = kernel_check._median_ms(lambda: runs.append(torch.ones(10)), budget_s=0.0)
    assert len(runs) > 1
    assert 0 < ms < 1000


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--kernels", "--device", "cuda:99"]) == 2
    assert "cuda:99" in capsys.readouterr().err


@pytest.mark.parametrize(("free_gib", "rows"), [(15.5, 8192), (40, 16384), (0.001, 16)])
def test_the_check_fits_the_memory_that_is_free(
    monkeypatch: pytest.MonkeyPatch, free_gib: float, rows: int
) -> None:
    monkeypatch.setattr(kernel_check, "device_memory", lambda device: free_gib * 2**30)
    with fake_tensors():
        # Without adamw, whose tensors cannot be faked.
        *_, (_, op) = islice(kernel_check._ops(torch.device("cuda"), "bf16"), 5)
        assert op.inputs[0].shape == (rows, 1024)


def test_the_bytes_of_a_logit_are_those_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    n, v = 128, 32768
    loss, precision = (
        catalogue.linear_cross_entropy("fp32", v, 16, n),
        resolve_precision("fp32", CPU),
    )
    monkeypatch.setattr(kernel_check, "resolve_precision", lambda *_: precision)
    monkeypatch.setattr(kernel_check, "_ops", lambda *_: [("loss", loss)])
    per_logit = measure_peak(lambda: list(check_kernels(CPU)), CPU) / (n * v)
    assert 0.7 * kernel_check.LOSS_BYTES < per_logit < kernel_check.LOSS_BYTES


def test_the_kernels_of_attention_that_run_here_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CPU has a FlashAttention of its own and no cuDNN."""
    ran: list[None] = []
    monkeypatch.setattr(kernel_check, "_median_ms", lambda run: ran.append(run()) or 1.5)
    assert kernel_check.attention_ms(CPU, torch.float32) == {"flash": 1.5}
    assert ran == [None]
