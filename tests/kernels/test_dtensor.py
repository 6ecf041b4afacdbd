"""Optimizers on DTensor shards: two real processes, and a group that pretends to have four."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fasttrain_kernels import FusedAdamW, Muon, adamw_reference, grad_norm
from fasttrain_kernels._dispatch import triton_on_cpu
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.support.ranks import run_script

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


@pytest.mark.parametrize("rank", [0, WORLD_SIZE - 1])
def test_muon_refuses_shards_that_are_no_rows(rank: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD_SIZE)
    try:
        mesh = init_device_mesh("cpu", (WORLD_SIZE,))
        param = nn.Parameter(DTensor.from_local(torch.ones(3, 2), mesh, [Shard(1)]))
        param.grad = DTensor.from_local(torch.ones(3, 2), mesh, [Shard(1)])
        with pytest.raises(TypeError, match=r"Muon: .*DTensor .*\(Shard\(dim=1\),\)"):
            Muon([param]).step()
    finally:
        dist.destroy_process_group()


TWO_RANKS = """
import copy, importlib
import torch
import torch.distributed as dist
from fasttrain_kernels import FusedAdamW, Muon, clip_grad_norm_, grad_norm
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (2,))
ranks = mesh.get_group()
torch.manual_seed(0)
# square, tall and wide; one row and one of three rows: shards that are empty and uneven
shapes = [(8, 8), (8, 8), (6, 20), (20, 6), (1, 5), (3, 7), (3, 7)]
placements = [[Shard(0)]] * 6 + [[Replicate()]]
values = [torch.randn(s) for s in shapes]
grads = [[torch.randn(s) for s in shapes] for _ in range(4)]
module = importlib.import_module("fasttrain_kernels.muon")
real, seen = module.newton_schulz, [0]
def counted(g, *args, **kwargs):
    seen[0] += len(g)
    return real(g, *args, **kwargs)
module.newton_schulz = counted

def run(optimizer_class, spread, **options):
    params = [nn.Parameter(spread(i, v.clone())) for i, v in enumerate(values)]
    optimizer = optimizer_class(params, 0.1, weight_decay=0.1, **options)
    norms = []
    for step, gradients in enumerate(grads):
        for i, (p, g) in enumerate(zip(params, gradients)):
            p.grad = None if (step, i) in ((0, 1), (2, 3)) else spread(i, g.clone())
        if step == 2:  # as after a restart
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = optimizer_class(params, 0.1, weight_decay=0.1, **options)
            optimizer.load_state_dict(saved)
        sharded = [p.grad for p in params[:6] if p.grad is not None]
        norm = grad_norm(sharded, 1.0, group=ranks if isinstance(params[0], DTensor) else None)
        norms.append(norm.norm)
        flag = torch.tensor(1.0 if step == 1 else 0.0)
        optimizer.step(clip_coefficient=norm.clip_coefficient, found_inf=flag)
    return params, optimizer, norms

def whole(i, value):
    return value
def shards(i, value):
    return distribute_tensor(value, mesh, placements[i])

for optimizer_class, options in ((Muon, {"ns_dtype": torch.float32}), (FusedAdamW, {})):
    before = seen[0]
    expected, reference, norms = run(optimizer_class, whole, **options)
    seen[0] = before  # what this rank orthogonalises of its shards is counted alone
    ours, optimizer, our_norms = run(optimizer_class, shards, **options)
    torch.testing.assert_close(our_norms, norms)
    for a, b, placement in zip(ours, expected, placements):
        assert list(a.placements) == placement
        torch.testing.assert_close(a.full_tensor(), b.detach(), rtol=1e-4, atol=1e-5)
        for key, state in reference.state[b].items():
            mine = optimizer.state[a][key]
            if key != "step":
                assert list(mine.placements) == placement
                mine = mine.full_tensor()
            torch.testing.assert_close(mine, state, rtol=1e-4, atol=1e-5)

# Each of 6 sharded matrices was orthogonalised by one rank, the replicated one by both, in 3 steps
# (the fourth was skipped); two gradients were missing.
count = torch.tensor(seen[0])
dist.all_reduce(count)
assert count == 3 * 6 - 2 + 3 * 2, (count, seen)
assert 8 <= seen[0] <= 14, "one rank did most of it"

# What a second rank holds counts in the norm, and in what it scales.
p = nn.Parameter(shards(0, values[0].clone()))
p.grad = shards(0, grads[0][0].clone())
norm = clip_grad_norm_([p], 0.5, group=ranks)
torch.testing.assert_close(norm, grads[0][0].norm())
torch.testing.assert_close(p.grad.full_tensor().norm(), torch.tensor(0.5), rtol=1e-5, atol=0)
dist.destroy_process_group()
print("agreed")
"""


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    """Muon, AdamW and the norm on shards that are uneven and empty, against whole tensors."""
    outputs = run_script(TWO_RANKS, size=2, folder=tmp_path)
    assert all(output.strip().endswith("agreed") for output in outputs), "\n".join(outputs)


def test_a_sharded_tensor_costs_the_host_no_more_than_a_plain_one(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls of functions, for each of a hundred tensors in a step: 34 and 41; once 55 and 207."""
    module = importlib.import_module("fasttrain_kernels.adamw")
    for name in ("adamw_kernel", "advance_kernel"):
        monkeypatch.setattr(module, name, Nothing())

    def calls(make: Callable[[], torch.Tensor]) -> float:
        params = [nn.Parameter(make()) for _ in range(100)]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer, n_calls = FusedAdamW(params), 0

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal n_calls
            n_calls += event in ("call", "c_call")

        with triton_on_cpu():
            for _ in range(2):
                optimizer.step()
            sys.setprofile(count)
            optimizer.step()
            sys.setprofile(None)
        return n_calls / len(params)

    whole = torch.ones(SHAPE)
    assert calls(whole.clone) < 45
    assert calls(lambda: shard(whole, mesh)) < 50


class Nothing:
    """A kernel that launches nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *_, **__: None
