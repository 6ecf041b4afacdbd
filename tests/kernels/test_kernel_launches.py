"""What holds for the launches of every kernel: no waiting, the tensor's device, a long grid."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fasttrain_kernels import FusedAdamW, grad_norm
from fasttrain_kernels.catalogue import CASES
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

PACKAGE = Path(__file__).parents[2] / "kernels/fasttrain_kernels"

# Operations that make the host wait for a GPU: they read a value back.
WAITING = {
    "aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal",
    "aten::masked_select", "aten::unique_dim", "aten::_unique2",
}  # fmt: skip

ONE_OF_EACH = (
    "cross_entropy bf16 V=131 forward",
    "cross_entropy fp32 V=8001 every option",
    "cross_entropy fp16 V=50257",
    "linear_cross_entropy bf16 V=50257",
    "rms_norm bf16 D=64",
    "rms_norm bf16 D=768 residual",
    "swiglu bf16 halves of one projection",
    "relu_squared bf16",
    "apply_rope bf16 K=64",
)


def operations(call: Callable[[], object]) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return {event.name for event in profiler.events()}


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # torch 2.11
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_host_does_not_wait(triton_device: torch.device, name: str) -> None:
    """Forward, backward and step read no value of a tensor; they can be captured in a graph."""
    case = next(case for case in CASES if case.name == name)
    with triton_device:  # where the case makes its tensors
        seen = operations(case.run)
    assert any(name.startswith("aten::") for name in seen), "the profiler saw nothing"
    assert not seen & WAITING


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # torch 2.11
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_eager_ops_do_not_pass_the_dispatcher(triton_device: torch.device, name: str) -> None:
    """It costs them several times as much of the host; they do where a mode sees each op."""
    case = next(case for case in CASES if case.name == name)

    def dispatched() -> list[str]:
        with triton_device:
            return [op for op in operations(case.run) if op.startswith("fasttrain_kernels::")]

    assert dispatched() == []
    with FlopCounterMode(display=False):
        assert len(dispatched()) in (1, 2)  # forward, and a backward op where there is one


@pytest.mark.parametrize("rounding", [False, True])
def test_optimizer_steps_do_not_wait(triton_device: torch.device, rounding: bool) -> None:
    """From the second step on; the first one makes its tables of addresses on the host."""
    param = torch.nn.Parameter(torch.ones(9000, dtype=torch.bfloat16, device=triton_device))
    optimizer = FusedAdamW([param], stochastic_rounding=rounding)

    def step() -> None:
        param.grad = torch.ones_like(param)
        result = grad_norm([param.grad], 1.0)
        optimizer.step(clip_coefficient=result.clip_coefficient, found_inf=result.found_inf)

    step()
    assert not operations(step) & WAITING


def test_the_profiler_sees_a_wait() -> None:
    assert operations(lambda: torch.ones(()).item()) & WAITING


def launches() -> Iterator[tuple[str, ast.Call, list[ast.AST]]]:
    """Yield (file, call, the nodes around it) of every ``kernel[grid](...)`` in the package."""
    for path in sorted(PACKAGE.glob("*.py")):
        stack: list[tuple[ast.AST, list[ast.AST]]] = [(ast.parse(path.read_text("utf-8")), [])]
        while stack:
            node, around = stack.pop()
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Subscript)
                and ast.unparse(node.func.value).endswith("kernel")
            ):
                yield path.name, node, around
            stack += [(child, [*around, node]) for child in ast.iter_child_nodes(node)]


def test_every_launch_is_on_its_tensors_device() -> None:
    """Triton launches on the current device: each launch makes its tensor's device that."""
    found = list(launches())
    assert len(found) >= 10
    for name, call, around in found:
        guards = [ast.unparse(item) for n in around if isinstance(n, ast.With) for item in n.items]
        guarded = any(guard.startswith("torch.cuda.device_of(") for guard in guards)
        assert guarded, f"{name}:{call.lineno}"


def test_grids_have_one_dimension() -> None:
    """The first dimension of a grid may be 2³¹ − 1 long, the others only 65535."""
    for name, call, around in launches():
        assert isinstance(call.func, ast.Subscript)
        grid = call.func.slice
        if isinstance(grid, ast.Name):
            outer = next(n for n in around if isinstance(n, ast.FunctionDef))
            values = [
                n.value for n in ast.walk(outer)
                if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == grid.id
            ]  # fmt: skip
            assert len(values) == 1, f"{name}:{call.lineno}"
            grid = values[0]
        assert isinstance(grid, ast.Tuple), f"{name}:{call.lineno}"
        assert len(grid.elts) == 1, f"{name}:{call.lineno}"
