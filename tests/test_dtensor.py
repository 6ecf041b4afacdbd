"""Optimizers on DTensor shards, with a process group that only pretends to have other ranks."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from fasttrain_kernels import FusedAdamW, adamw_reference, grad_norm
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

WORLD_SIZE, SHAPE = 4, (3, 5)  # three rows over four ranks: the last shard is empty


@pytest.fixture(params=[0, WORLD_SIZE - 1], ids=["a shard", "an empty shard"])
def mesh(request: pytest.FixtureRequest) -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=WORLD_SIZE)
    yield init_device_mesh("cpu", (WORLD_SIZE,))
    dist.destroy_process_group()


@pytest.fixture(params=["torch", "triton"])
def path(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        if torch.cuda.is_available():
            pytest.skip("the fake process group has no GPU: the kernels run interpreted only")
        request.getfixturevalue("triton_device")
    return request.param


def shard(whole: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    """Return what this rank holds of a tensor whose rows are spread over the ranks."""
    rows = slice(dist.get_rank(), dist.get_rank() + 1)
    local = whole[rows].clone()
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def test_shards_are_updated_like_the_whole(mesh: DeviceMesh, path: str) -> None:
    torch.manual_seed(0)
    weight, grads = torch.randn(SHAPE), [torch.randn(SHAPE) for _ in range(3)]
    param = nn.Parameter(shard(weight, mesh))
    other = nn.Parameter(weight[0].clone())  # an ordinary parameter in the same step
    optimizer = FusedAdamW([param, other], lr=0.1)
    expected = (weight, torch.zeros(SHAPE), torch.zeros(SHAPE))
    for step, grad in enumerate(grads, start=1):
        param.grad, other.grad = shard(grad, mesh), grad[0].clone()
        optimizer.step()
        expected = adamw_reference(expected[0], grad, *expected[1:], step, lr=0.1)
    rows = slice(dist.get_rank(), dist.get_rank() + 1)
    state = optimizer.state[param]
    for ours, whole in zip((param, state["exp_avg"], state["exp_avg_sq"]), expected, strict=True):
        assert isinstance(ours.detach(), DTensor)
        torch.testing.assert_close(ours.to_local().double(), whole[rows], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(other.detach().double(), expected[0][0], atol=1e-6, rtol=1e-5)
    assert state["step"] == 3


def test_a_norm_counts_the_shard_that_is_here(mesh: DeviceMesh, path: str) -> None:
    whole = torch.arange(15.0).reshape(SHAPE)
    rows = slice(dist.get_rank(), dist.get_rank() + 1)
    result = grad_norm([shard(whole, mesh)], 1.0)
    torch.testing.assert_close(result.norm, whole[rows].norm())
    assert result.found_inf == 0
