"""What is known of torch's private names: it is there, and where it is not nothing goes wrong."""

import math

import pytest
import torch
from fasttrain_kernels import FusedAdamW, _torch, linear_cross_entropy
from torch.autograd import forward_ad

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("bf16", "amx", "capability", "native"),
    [
        (False, False, "AVX512", False),
        (True, False, "AVX512", True),
        (False, True, "AVX512", True),
        (True, True, "AVX2", False),  # held to less, as by ATEN_CPU_CAPABILITY
        (False, False, "DEFAULT", False),
    ],
)
def test_N5_bf16_is_native_where_torch_may_use_it(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, amx: bool, capability: str, native: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert _torch.native_bf16(CPU) is native


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
