"""apply_rope: kernel, eager CPU path, compiled path."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fasttrain_kernels.rope import apply_rope, apply_rope_reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

# The interpreter truncates where bf16 stores round, so bf16 is tested on a GPU alone.
HALF_DTYPES = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]
SLACK = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}
Rope = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def rotate_half(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The convention of Llama and Hugging Face, in the dtype of its inputs: a judge of ours."""
    c, s = (torch.cat((t, t), -1).unsqueeze(-2) for t in (cos, sin))

    def turn(x: Tensor) -> Tensor:
        lo, hi = x.chunk(2, -1)
        return x * c.to(x.dtype) + torch.cat((-hi, lo), -1) * s.to(x.dtype)

    return turn(q), turn(k)


def tables(n_tokens: int, dim: int, n_batch: int | None = None) -> tuple[Tensor, Tensor]:
    """Cosine and sine of positions × frequencies, each batch at another offset."""
    positions = torch.arange(n_tokens, dtype=torch.float64)
    if n_batch is not None:
        positions = positions + 10 * torch.arange(n_batch)[:, None]
    frequencies = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = positions[..., None] * frequencies
    return angles.cos(), angles.sin()


def make(b: int, t: int, h: int, h_kv: int, dim: int, order: str, dtype: torch.dtype):
    """Queries and keys of shape (B, T, heads, K) in one of the layouts that models produce."""
    generator = torch.Generator().manual_seed(0)
    if order == "fused":
        both = torch.randn(b, t, h + h_kv, dim, generator=generator).to(dtype)
        return both[:, :, :h], both[:, :, h:]
    if order == "heads_first":
        q, k = (torch.randn(b, n, t, dim, generator=generator).to(dtype) for n in (h, h_kv))
        return q.transpose(1, 2), k.transpose(1, 2)
    return tuple(torch.randn(b, t, n, dim, generator=generator).to(dtype) for n in (h, h_kv))


def results(fn: Rope, inputs: tuple[Tensor, ...], device: torch.device | str = "cpu"):
    q, k, cos, sin = (t.detach().to(device) for t in inputs)
    outs = fn(q.requires_grad_(), k.requires_grad_(), cos, sin)
    generator = torch.Generator().manual_seed(3)
    incoming = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outs]
    grads = torch.autograd.grad(outs, (q, k), incoming)
    return [t.detach().cpu().double() for t in (*outs, *grads)]


def assert_as_good_as_torch(
    fn: Rope, inputs: tuple[Tensor, ...], device: torch.device | str
) -> None:
    """The error against fp64 is at most twice plain torch's own, plus the dtype's slack."""
    q, k, cos, sin = inputs
    rounded = (q, k, cos.float(), sin.float())
    exact = results(rotate_half, (q.double(), k.double(), cos.float(), sin.float()))
    torch_own = results(rotate_half, rounded)
    for got, own, want in zip(results(fn, rounded, device), torch_own, exact, strict=True):
        assert got.shape == want.shape
        if want.numel():
            slack = SLACK[q.dtype] * max(1.0, want.abs().max().item())
            assert (got - want).abs().max() <= 2 * (own - want).abs().max() + slack


SHAPES = {
    "b": st.integers(0, 3),
    "t": st.integers(1, 9),
    "h_kv": st.integers(1, 3),
    "groups": st.integers(1, 3),
    "dim": st.sampled_from([2, 6, 64, 80, 128]),
    "order": st.sampled_from(["contiguous", "fused", "heads_first"]),
    "batched": st.booleans(),
}


def inputs_of(
    b: int, t: int, h_kv: int, groups: int, dim: int, order: str, batched: bool, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    q, k = make(b, t, h_kv * groups, h_kv, dim, order, dtype)
    return q, k, *tables(t, dim, b if batched else None)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**SHAPES, dtype=st.sampled_from([torch.float32, *HALF_DTYPES]))
def test_kernel_matches_fp64(triton_device: torch.device, **case: Any) -> None:
    assert_as_good_as_torch(apply_rope, inputs_of(**case), triton_device)


@settings(max_examples=25)
@given(**SHAPES, dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_eager_cpu_path_and_reference_match_fp64(**case: Any) -> None:
    for fn in (apply_rope, apply_rope_reference):
        assert_as_good_as_torch(fn, inputs_of(**case), "cpu")


def test_scores_depend_on_distance_alone_and_lengths_stay(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 32, generator=generator).to(device) for _ in range(2))
    cos, sin = (t.float().to(device) for t in tables(12, 32))
    rotated_q, rotated_k = apply_rope(q.expand(1, 12, 1, 32), k.expand(1, 12, 1, 32), cos, sin)
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm(dim=-1).expand(1, 12, 1))
    scores = rotated_q[0, :, 0] @ rotated_k[0, :, 0].T
    for distance in range(12):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert (scores[0] - scores[0, 0]).abs().max() > 1e-2  # and it does depend on the distance


def test_rows_further_apart_than_int32(triton_device: torch.device) -> None:
    # Untouched pages of the buffer are never backed by memory, so 4 GiB apart costs nothing.
    stride = 2**31 + 64
    buffer = torch.empty(stride + 64, dtype=torch.float16, device=triton_device)
    generator = torch.Generator().manual_seed(0)
    cos, sin = (t.float().to(triton_device) for t in tables(2, 8))
    for strides in [(stride, 32, 8, 1), (32, stride, 8, 1), (16, 8, stride, 1)]:
        far = buffer.as_strided((2, 2, 2, 8), strides)
        far.copy_(torch.randn(2, 2, 2, 8, generator=generator))
        near = far.contiguous()
        wanted = apply_rope_reference(near, near, cos, sin)
        for got in (apply_rope(far, near, cos, sin), apply_rope(near, far, cos, sin)):
            torch.testing.assert_close(got, wanted)


def test_opcheck(triton_device: torch.device) -> None:
    namespace = apply_rope.__module__.rpartition(".")[0].replace(".", "_")
    cos, sin = (t.float().to(triton_device) for t in tables(3, 8))
    q, k = make(2, 3, 4, 2, 8, "heads_first", torch.float32)
    q, k = (t.to(triton_device).requires_grad_() for t in (q, k))
    torch.library.opcheck(getattr(torch.ops, namespace).rope.default, (q, k, cos, sin, True))


def test_gradcheck_twice_in_fp64() -> None:
    q, k = make(1, 3, 2, 1, 4, "fused", torch.float64)
    leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
    assert torch.autograd.gradcheck(lambda q, k: apply_rope(q, k, *tables(3, 4)), leaves)
    assert torch.autograd.gradgradcheck(lambda q, k: apply_rope(q, k, *tables(3, 4)), leaves)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("batched", [False, True])
def test_compiles_to_one_graph_and_matches(batched: bool) -> None:
    torch._dynamo.reset()
    q, k = make(2, 5, 4, 2, 16, "contiguous", torch.float32)
    inputs = (q, k, *(t.float() for t in tables(5, 16, 2 if batched else None)))
    compiled = torch.compile(
        apply_rope, fullgraph=True, backend="aot_eager" if batched else "inductor"
    )
    for a, b in zip(results(compiled, inputs), results(apply_rope, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_two_runs_agree_bit_for_bit_also_under_autocast(device: torch.device) -> None:
    inputs = (*make(2, 5, 4, 2, 16, "fused", torch.float32), *tables(5, 16))
    first = results(apply_rope, inputs, device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        second = results(apply_rope, inputs, device)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_queries_used_and_only_tables_saved(device: torch.device) -> None:
    q, k = (t.to(device).requires_grad_() for t in make(2, 5, 4, 2, 16, "", torch.float32))
    cos, sin = (t.float().to(device) for t in tables(5, 16))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rotated, _ = apply_rope(q, k, cos, sin)
    assert sum(t.nbytes for t in saved) == cos.nbytes + sin.nbytes
    dq, dk = torch.autograd.grad(rotated.square().sum(), (q, k), materialize_grads=True)
    torch.testing.assert_close(dq, 2 * q.detach())  # a rotation keeps the length
    assert not dk.any()


@pytest.mark.parametrize(
    ("q", "k", "cos", "message"),
    [
        ((2, 3, 8), (2, 3, 1, 8), (3, 4), r"q .*\(B, T, H, K\).*\(2, 3, 8\)"),
        ((2, 3, 4, 7), (2, 3, 1, 7), (3, 3), r"q .*\beven\b.*\(2, 3, 4, 7\)"),
        ((2, 3, 4, 8), (2, 1, 3, 8), (3, 4), r"k .*\(2, 3, H_kv, 8\).*\(2, 1, 3, 8\)"),
        ((2, 3, 4, 8), (2, 3, 1, 6), (3, 4), r"k .*\(2, 3, H_kv, 8\).*\(2, 3, 1, 6\)"),
        ((2, 3, 4, 8), (2, 3, 1, 8), (9, 4), r"cos .*\(3, 4\).*\(9, 4\)"),
        ((2, 3, 4, 8), (2, 3, 1, 8), (3, 8), r"cos .*\(3, 4\).*\(3, 8\)"),
    ],
)
def test_errors_name_value_and_remedy(
    q: tuple[int, ...], k: tuple[int, ...], cos: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=f"apply_rope: {message}"):
        apply_rope(torch.ones(q), torch.ones(k), torch.ones(cos), torch.ones(cos))


def test_errors_of_device_and_dtype() -> None:
    x, table = torch.ones(1, 2, 1, 4), torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"apply_rope: k .*\bmeta\b.*\bq\b.*\bcpu\b"):
        apply_rope(x, x.to("meta"), table, table)
    with pytest.raises(ValueError, match=r"apply_rope: cos .*torch\.int64"):
        apply_rope(x, x, table.long(), table)
    with pytest.raises(ValueError, match=r"apply_rope: sin .*\(1, 2, 2\)"):
        apply_rope(x, x, table, table[None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_in_half_precision_round_the_result_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 16, 3, 8, generator=generator).to(dtype)
    cos, sin = torch.randn(2, 16, 4, generator=generator).to(dtype)
    exact = apply_rope_reference(q, k, cos, sin)
    for ours, right in zip(apply_rope(q, k, cos, sin), exact, strict=True):
        torch.testing.assert_close(ours, right, rtol=torch.finfo(dtype).eps, atol=0)
