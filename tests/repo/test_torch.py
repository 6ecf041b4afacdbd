"""What is known of torch's private names: it is there, and where it is not nothing goes wrong."""

import math
from pathlib import Path

import pytest
import torch
from fasttrain_kernels import FusedAdamW, _torch, linear_cross_entropy
from torch.autograd import forward_ad

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("vendor", "bf16", "amx", "capability", "known", "native"),
    [
        ("AuthenticAMD", False, False, "AVX512", False, False),
        ("AuthenticAMD", True, False, "AVX512", True, True),
        ("GenuineIntel", True, False, "AVX512", True, False),  # at half of fp32's rate
        ("GenuineIntel", True, True, "AVX512", True, True),
        ("GenuineIntel", False, True, "AVX512", True, True),
        ("GenuineIntel", True, True, "AVX2", False, False),  # held by ATEN_CPU_CAPABILITY
        ("GenuineIntel", False, False, "DEFAULT", False, False),
        (None, True, False, "AVX512", True, True),  # not Linux
    ],
)
def test_bf16_is_native_where_it_is_faster_than_fp32_and_torch_may_use_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vendor: str | None, bf16: bool, amx: bool,
    capability: str, known: bool, native: bool,
) -> None:  # fmt: skip
    cpuinfo = tmp_path / "cpuinfo"
    if vendor:
        cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(_torch, "_CPUINFO", cpuinfo)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    _torch._is_intel.cache_clear()
    try:
        assert _torch.has_bf16_instructions() is known
        assert _torch.native_bf16(CPU) is native
    finally:
        _torch._is_intel.cache_clear()


def test_this_torch_has_the_names() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = FusedAdamW([weight])
    assert not _torch.is_being_transformed()
    assert not _torch.is_dispatch_observed()
    assert not _torch.is_step_observed(optimizer)
    assert _torch.fsdp_collectives() is not None
    with forward_ad.dual_level():
        assert _torch.is_being_transformed()
    with _torch.TorchDispatchMode():
        assert _torch.is_dispatch_observed()
    optimizer.register_step_pre_hook(lambda *_: None)
    assert _torch.is_step_observed(optimizer)


def test_without_the_names_everything_is_observed_and_computes_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def losses() -> list[float]:
        torch.manual_seed(0)
        hidden, weight = torch.randn(6, 16), torch.nn.Parameter(torch.randn(32, 16))
        optimizer, found = FusedAdamW([weight], lr=0.1), []
        for _ in range(3):
            loss = linear_cross_entropy(hidden, weight, torch.arange(6))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    with_names = losses()
    monkeypatch.setattr(_torch, "_private", lambda path, default: default)
    assert _torch.is_being_transformed()
    assert _torch.is_dispatch_observed()
    assert _torch.is_step_observed(FusedAdamW([torch.nn.Parameter(torch.ones(2))]))
    assert not _torch.native_bf16(CPU)
    without = losses()
    assert without[2] < without[0]
    assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(with_names, without, strict=True))
