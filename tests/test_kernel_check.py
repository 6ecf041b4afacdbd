"""The check of kernels finds a wrong one, and times every path."""

import math
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrain import kernel_check
from fasttrain.device import resolve_precision
from fasttrain.kernel_check import CHOICES, check_kernels
from fasttrain.preflight import main

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time each path once."""

    def once(run: Any) -> float:
        run()
        return 1.0

    monkeypatch.setattr(kernel_check, "_median_ms", once)


def test_every_operation_is_right_here_and_has_a_choice() -> None:
    reports = list(check_kernels(CPU, compiled=False))
    assert [report.name for report in reports] == list(CHOICES)
    for report in reports:
        assert report.right, report
        assert report.error > 0  # it is compared with something else
        assert report.ms.keys() == {"ours", "torch"}


@pytest.mark.parametrize(("dtype", "fault"), [("fp32", 1e-4), ("bf16", 0.05)])
def test_a_wrong_kernel_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dtype: str, fault: float
) -> None:
    right, precision = kernel_check.swiglu, resolve_precision(dtype, CPU)

    def wrong(gate: Tensor, up: Tensor) -> Tensor:
        return right(gate, up) * (1 + fault)

    monkeypatch.setattr(kernel_check, "resolve_precision", lambda *_: precision)
    monkeypatch.setattr(kernel_check, "swiglu", wrong)
    monkeypatch.setattr(kernel_check, "rms_norm", lambda x, w: x * w * math.nan)
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)
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
