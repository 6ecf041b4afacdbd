"""Attention for compiled training on a CPU: as exact as torch's, and chosen where it goes."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels.cpu import attention as attention_cpu
from fasttrain_kernels.cpu.attention import causal_attention, is_fast_here
from torch import Tensor

from fasttrain.config import ModelConfig
from fasttrain.model.attention import Attention

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or "AVX" not in torch.backends.cpu.get_cpu_capability(),
    reason="needs AVX2 and g++",
)


def inputs(
    b: int, t: int, h: int, g: int, k: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Return q, k and v as a fused projection leaves them: side by side in one tensor."""
    torch.manual_seed(0)
    parts = torch.randn(b, t, (h + 2 * g) * k).to(dtype).split([h * k, g * k, g * k], -1)
    return [x.unflatten(-1, (-1, k)).requires_grad_() for x in parts]


def by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2)


def results(attend: object, tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
    y = attend(*tensors)  # type: ignore[operator]
    return [y.detach(), *torch.autograd.grad(y, tensors, upstream)]


# Blocks are of 64 queries and keys: whole ones, rests, groups of heads over several blocks, and a
# single token.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("b", "t", "h", "g", "k"),
    [(2, 64, 2, 2, 32), (1, 77, 6, 2, 48), (2, 1, 2, 1, 16), (1, 131, 4, 4, 128), (3, 5, 1, 1, 80)],
)
def test_output_and_gradients_are_as_exact_as_torchs(
    b: int, t: int, h: int, g: int, k: int, dtype: torch.dtype
) -> None:
    tensors = inputs(b, t, h, g, k, dtype)
    upstream = (
        torch.randn(b, h, t, k).to(dtype).transpose(1, 2)
    )  # strided, as a caller may leave it
    exact = results(by_torch, [x.detach().double().requires_grad_() for x in tensors], upstream)
    theirs = results(by_torch, tensors, upstream)
    ours = results(lambda *x: causal_attention(*x)[0], tensors, upstream)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 3)
    try:
        again = results(lambda *x: causal_attention(*x)[0], tensors, upstream)
    finally:
        torch.set_num_threads(threads)
    for own, other, true, same in zip(ours, theirs, exact, again, strict=True):
        # Weights and their gradients are rounded to bf16; torch keeps some in fp32.
        rounding = 2**-8 * true.abs().max() if dtype == torch.bfloat16 else 1e-5
        limit = 2 * (other - true).abs().max() + rounding
        assert (own - true).abs().max() <= limit
        assert torch.equal(own, same)


def test_log_sum_exp_and_what_is_not_finite() -> None:
    q, k, v = (x.detach() for x in inputs(1, 40, 2, 2, 16))
    scores = torch.einsum("bihk,bjhk->bhij", q, k).double() / 4
    hidden = torch.ones(40, 40).triu(1).bool()
    expected = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(causal_attention(q, k, v)[1].double(), expected)
    q[0, 7] = torch.nan
    y = causal_attention(q, k, v)[0]
    assert y[0, 7].isnan().all()
    assert y[0, [*range(7), *range(8, 40)]].isfinite().all()


def test_the_op_is_registered_as_torch_wants_it() -> None:
    tensors = tuple(x.detach() for x in inputs(1, 9, 2, 1, 16))
    ops = torch.ops.fasttrain_kernels
    y, lse = causal_attention(*tensors)
    torch.library.opcheck(ops.causal_attention_forward, tensors)
    torch.library.opcheck(ops.causal_attention_backward, (torch.ones_like(y), *tensors, y, lse))


def test_a_compiled_model_attends_by_it_where_supported_and_an_eager_one_by_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_cpu, "_FAST", [torch.float32])
    config = ModelConfig(vocab_size=8, dim=32, n_heads=2)
    attention = Attention(config)
    x = torch.randn(2, 10, 32)
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x: attention(x, None, None), backend=keep, fullgraph=True, dynamic=False
    )
    torch.testing.assert_close(compiled(x), attention(x, None, None))
    assert "causal_attention" in graphs[0].code
    traced = torch.compile(lambda x: attention(x, None, None), backend="aot_eager", dynamic=False)
    weights = list(attention.parameters())
    for own, eager in zip(
        torch.autograd.grad(traced(x).square().sum(), weights),
        torch.autograd.grad(attention(x, None, None).square().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(own, eager)
    assert not is_fast_here(x.unflatten(-1, (2, 16)))
    monkeypatch.setattr(attention_cpu, "_FAST", [])
    torch.testing.assert_close(compiled(x), attention(x, None, None))
    assert "scaled_dot_product_attention" in graphs[1].code


def test_what_it_cannot_take_is_refused_and_what_is_not_finite_is_seen() -> None:
    q, k, v = (x.detach() for x in inputs(1, 33, 2, 1, 16))
    for wrong in ((q, k, v[:, :4]), (q, k.double(), v.double()), (q[..., :8], k[..., :8], v)):
        with pytest.raises(ValueError, match=r"causal_attention: .*(multiple of 16|takes fp32 or)"):
            causal_attention(*wrong)
    q[0, 0], k[0, 0] = 1e20, -1e20  # the first token's only score is -inf
    y = causal_attention(q, k, v)[0]
    assert y[0, 0].isnan().all()
    assert y[0, 1:].isfinite().all()
