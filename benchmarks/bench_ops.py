"""Every op, forward and backward, beside plain torch, the compiler and the installed peers.

`TABLE` names the ops with their sizes: on a CPU what a small trainer meets; on a GPU those of the
targets, well past the L2 cache. Inputs, references, bytes and FLOPs are the kernels' catalogue's.
"""

import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import fasttrain_kernels as kernels
import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import catalogue
from fasttrain_kernels.catalogue import Op, both_ways, results
from torch import Tensor, nn

from benchmarks.harness import CUDA, DEVICE, DTYPE, OURS, Call, check, gather
from fasttrain.preflight.memory import measure_peak

compiled = partial(torch.compile, dynamic=False)
NAME = "bf16" if CUDA else "fp32"
N_CHECKED = 128  # rows, of which the reference in fp32 takes seconds at most
# Makers of one op's rivals at one size, ours first (`harness.gather`), and options of `compare`.
Subject = tuple[Mapping[str, Callable[[], Call]], Mapping[str, Any]]


def peer(place: str, **options: Any) -> Call:
    """Return a peer's op, ``module:name``, whose kernels run on a CUDA device alone."""
    if not CUDA:
        raise ImportError("needs a CUDA device")
    return partial(pkgutil.resolve_name(place), **options)


def seeds(outputs: list[Tensor]) -> Sequence[Tensor | None]:
    """Return incoming gradients: of a loss 1, which may have a shortcut."""
    return [None] if outputs[0].dim() == 0 else catalogue.uneven(outputs)


def differentiable(
    make: Callable[..., Op], n_rows: int, *widths: int, peers: Mapping[str, Any] = {},
    also_compiled: bool = False,
) -> Subject:  # fmt: skip
    """Return the subject of an op with so many rows, forward and backward; few are checked."""
    with torch.device(DEVICE):
        op, few = (make(NAME, *widths[::-1], n) for n in (n_rows, min(n_rows, N_CHECKED)))
    assert op.torch is not None
    exact = results(few.reference, few, torch.float32, seeds)
    inputs = [t.to(DTYPE) for t in op.inputs]
    outputs = op.torch(*inputs, *op.constants)
    incoming = seeds([outputs] if isinstance(outputs, Tensor) else list(outputs))

    def maker(name: str, find: Callable[[], Call]) -> Call:
        fn = find()
        check(name, results(fn, few, DTYPE, seeds), exact)
        # Liger writes a loss's gradient over the logits, which the others must not find there.
        own = [t.clone() if name == "liger" else t.detach() for t in inputs]
        leaves = [t.requires_grad_() for t in own]
        return lambda: both_ways(fn, leaves, op.constants, lambda _: incoming)

    found = {OURS: lambda: op.ours, "torch": lambda: op.torch, **peers}
    if CUDA or not op.flops:  # on a CPU products dominate: a compiler changes nothing
        found |= {"torch.compile": partial(compiled, op.torch)}
    if also_compiled:
        found |= {"fasttrain compiled": partial(compiled, op.ours)}
    rates = {"gb_per_s": op.n_bytes / 1e9, "tflop_per_s": op.flops / 1e12}
    options = {
        "per_call": {key: amount for key, amount in rates.items() if amount},
        "n_calls": 5 if CUDA and op.n_bytes else 1,
        "warmup": 1 if op.flops else 2,
    }
    return {name: partial(maker, name, find) for name, find in found.items()}, options


def torch_chunked() -> Call:
    # Its default options are slower and take as much memory.
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=256, chunking_method=None)
    return partial(F.linear_cross_entropy, options=options)


LIGER = "liger_kernel.transformers.functional:liger_"
OF_LOGITS = {
    "liger": partial(peer, f"{LIGER}cross_entropy"),
    "quack": partial(peer, "quack.cross_entropy:cross_entropy", reduction="mean"),
}
OF_A_LAYER = {
    "torch chunked": torch_chunked,
    "liger": partial(peer, f"{LIGER}fused_linear_cross_entropy"),
    "quack": partial(peer, "quack.linear_cross_entropy:chunked_linear_cross_entropy"),
    "cut_cross_entropy": partial(peer, "cut_cross_entropy:linear_cross_entropy"),
}
NORMS = {
    "liger": partial(peer, f"{LIGER}rms_norm", eps=1e-6),
    "quack": partial(peer, "quack.rmsnorm:rmsnorm", eps=1e-6),
}
SWIGLU = {"liger": partial(peer, f"{LIGER}swiglu")}
ROPE = {"batch": 8, "heads": (32, 8)} if CUDA else {"batch": 2, "heads": (12, 12)}

Params = list[nn.Parameter]


def optimizers(make: Call, ways: Mapping[str, Call], close: Call, **options: Any) -> Subject:
    """Return the subject of a step, after which parameters are close to those of the second way."""
    exact = make()
    list(ways.values())[1](exact)()

    def maker(name: str, way: Callable[[Params], Call]) -> Call:
        params = make()
        step = way(params)
        step()
        for p, q in zip(params, exact, strict=True):
            assert close(p, q) is not False, f"{name} does not step as torch does"
        return step

    return {k: partial(maker, k, way) for k, way in ways.items()}, {"warmup": 1} | options


def parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, scale: float) -> Params:
    """Return parameters with gradients, the same at every call."""
    normal = partial(torch.randn, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    params = [nn.Parameter((scale * normal(shape)).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = (1e-3 * normal(p.shape)).to(dtype)
    return params


# (layers, dim, vocabulary) of a GPT with tied embeddings: bound by overhead; GPT-2 small; large.
MODELS = {"0.8M": (4, 128, 256), "124M": (12, 768, 50304), "1B": (24, 1792, 50304)}


def clipped_step(model: str, precision: str) -> Subject:
    """A clipped AdamW step: grad_norm and FusedAdamW against torch's clipping and its AdamWs."""
    small, bf16 = model == "0.8M", precision == "bf16"

    def ours(params: Params) -> Call:
        optimizer = kernels.FusedAdamW(params, lr=1e-5)

        def step() -> None:
            norm = kernels.grad_norm([p.grad for p in params if p.grad is not None], 1.0)
            optimizer.step(clip_coefficient=norm.clip_coefficient, found_inf=norm.found_inf)

        return step

    def torchs(params: Params, **options: bool) -> Call:
        optimizer = torch.optim.AdamW(params, lr=1e-5, **options)
        return lambda: (nn.utils.clip_grad_norm_(params, 1.0), optimizer.step())

    ways = {"torch fused": {"fused": True}, "torch foreach": {"foreach": True}}
    if small:  # a loop over tensors: minutes of the large models' time
        ways["torch default"] = {"foreach": False}
    layers, dim, vocab = MODELS[model]
    block = [(dim,), (3 * dim, dim), (dim, dim), (dim,), (4 * dim, dim), (dim, 4 * dim)]
    shapes = [(vocab, dim), (1024, dim), *(block * layers), (dim,)]
    dtype = catalogue.DTYPES[precision]
    n_bytes = sum(map(math.prod, shapes)) * dtype.itemsize * 8  # norm 1, step 7
    close = partial(torch.testing.assert_close, rtol=2e-2 if bf16 else 1e-5, atol=1e-6)
    make, rates = partial(parameters, shapes, dtype, 0.02), {"gb_per_s": n_bytes / 1e9}
    steps = {OURS: ours} | {name: partial(torchs, **options) for name, options in ways.items()}
    return optimizers(make, steps, close, per_call=rates, n_calls=20 if small else 1)


def muon_step(coefficients: str, dim: int) -> Subject:
    """A Muon step against torch.optim.Muon, which multiplies in bf16: a CPU may emulate that."""
    block = [(dim, dim)] * 4 + [(dim, 3 * dim)] * 2 + [(3 * dim, dim)]
    make = partial(parameters, block * (12 if CUDA else 4), torch.float32, 0.0)
    ours = partial(kernels.Muon, lr=1e-3, weight_decay=0.1, coefficients=coefficients)
    theirs = partial(torch.optim.Muon, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")

    def close(p: Tensor, q: Tensor) -> bool:  # singular values differ, directions do not
        return torch.cosine_similarity(p.flatten(), q.flatten(), dim=0).item() > 0.9

    ways = {OURS: lambda params: ours(params).step, "torch": lambda params: theirs(params).step}
    return optimizers(make, ways, close)


def symmetric(n_rows: int) -> Subject:
    """The symmetric product against a full one."""
    x = torch.randn(1 if CUDA else 4, n_rows, n_rows, device=DEVICE, dtype=DTYPE)
    exact = torch.bmm(x, x.mT)
    check(OURS, [kernels.symmetric_matmul(x)], [exact])
    ours, torchs = partial(kernels.symmetric_matmul, x), partial(torch.bmm, x, x.mT)
    rates = {"tflop_per_s_of_a_full_product": 2 * len(x) * n_rows**3 / 1e12}
    options = {"per_call": rates, "n_calls": 5 if CUDA else 1}
    return {OURS: lambda: ours, "torch": lambda: torchs}, options


# Of each op the file and the name of its figures, what makes it, its sizes on a CPU and on a GPU.
TABLE: Any = (
    ("adamw", "clipped_step[{}-{}]", clipped_step,
     [("0.8M", "fp32"), ("0.8M", "bf16"), ("124M", "fp32")],
     [(model, dtype) for model in MODELS for dtype in ("fp32", "bf16")]),
    # (rows, vocabulary)
    ("cross_entropy", "cross_entropy[{}-{}]",
     partial(differentiable, catalogue.cross_entropy, peers=OF_LOGITS),
     [(2048, 4096), (128, 50304), (128, 50257)],
     [(8192, 128256), (8192, 50304), (8192, 50257), (8192, 32000)]),
    # (rows, dim, vocabulary)
    ("linear_cross_entropy", "linear_cross_entropy[{}-{}-{}]",
     partial(differentiable, catalogue.linear_cross_entropy, peers=OF_A_LAYER),
     [(4096, 256, 1024), (2048, 256, 4096), (768, 128, 65), (512, 768, 50304), (4096, 768, 50304)],
     [(4096, 4096, 128256), (32768, 768, 50304)]),
    # configs/base.toml; GPT-2 small
    ("muon", "muon_step[{}-{}]", muon_step,
     [("polar_express", 128), ("quintic", 128)], [("polar_express", 768), ("quintic", 768)]),
    ("muon", "symmetric_matmul[{}]", symmetric,
     [(256,), (768,)], [(1024,), (2048,), (4096,), (8192,)]),
    # (rows, dim): those of a model, and of QK-norm
    ("rms_norm", "rms_norm[{}-{}]",
     partial(differentiable, catalogue.rms_norm, peers=NORMS, also_compiled=True),
     [(2048, 768), (12288, 64)], [(65536, 2048), (32768, 4096), (16384, 8192), (1048576, 128)]),
    # (tokens, head_dim)
    ("rope", "rope", partial(differentiable, partial(catalogue.apply_rope, **ROPE),
                             also_compiled=True), [(512, 64)], [(8192, 128)]),
    ("swiglu", "activation[swiglu]", partial(differentiable, catalogue.swiglu, peers=SWIGLU),
     [(1024, 1536)], [(32768, 8192)]),
    ("swiglu", "activation[relu2]", partial(differentiable, catalogue.relu_squared),
     [(1024, 1536)], [(32768, 8192)]),
)  # fmt: skip


def cases() -> Any:
    for suite, name, make, cpu, gpu in TABLE:
        for size in gpu if CUDA else cpu:
            own = name.format(*size)
            marks = pytest.mark.figures(suite, name=own)
            yield pytest.param(own, partial(make, *size), id=own, marks=marks)


@pytest.mark.parametrize(("name", "make"), cases())
def test_op(compare: Any, full: bool, name: str, make: Callable[[], Subject]) -> None:
    if name == "linear_cross_entropy[4096-768-50304]" and not full:
        pytest.skip("takes two minutes: --full")
    torch._dynamo.reset()
    torch.manual_seed(0)
    makers, options = make()
    calls, left_out = gather(makers)
    compare(calls, left_out=left_out, **options)


@pytest.mark.figures("linear_cross_entropy")
def test_peak_memory(benchmark: Any) -> None:
    """What forward and backward hold at most beside their inputs, gradients included."""
    with torch.device(DEVICE):
        sizes = {"dim": 768, "n_rows": 32768} if CUDA else {"dim": 64, "n_rows": 2048}
        op = catalogue.linear_cross_entropy(NAME, 50304, **sizes)
    inputs = [t.requires_grad_() for t in op.inputs]

    def peak(way: Call) -> int:
        call = partial(both_ways, way, inputs, op.constants, seeds)
        return measure_peak(call, torch.device(DEVICE))

    peaks = {OURS: benchmark.pedantic(peak, (op.ours,)), "torch": peak(op.torch)}
    benchmark.extra_info["peak_bytes"] = peaks
