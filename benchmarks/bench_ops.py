"""Every op, forward and backward, beside plain torch, the compiler and the installed peers.

`TABLE` names the ops with their sizes: on a CPU what a small trainer meets; on a GPU those of the
targets, well past the L2 cache. Inputs, references, bytes and FLOPs are the kernels' catalogue's.
"""

import importlib
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import fasttrain_kernels as kernels
import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import catalogue
from fasttrain_kernels.catalogue import Op, both_ways, results
from torch import Tensor, nn

from benchmarks.harness import CUDA, DEVICE, DTYPE, OURS, TOLERANCE, Call, check, gather, run

compiled = partial(torch.compile, dynamic=False)
NAME = "bf16" if CUDA else "fp32"
N_CHECKED = 128  # rows, of which the reference in fp32 takes seconds at most


class Subject(NamedTuple):
    """One op at one size."""

    makers: Mapping[str, Callable[[], Any]]  # the rivals, ours first, see `harness.gather`
    verify: Callable[[str, Any], None]  # that a rival computes what the reference does
    call_of: Callable[[str, Any], Call]  # what is timed of a rival
    options: Mapping[str, Any]  # those of the fixture `compare`


# ---- ops with a backward pass --------------------------------------------------------------------


def absent(why: str) -> Call:
    raise ImportError(why)


def peer(place: str, adapt: Callable[[Call], Call] = lambda op: op) -> Callable[[], Call]:
    """Return a maker of a peer's op, ``module:name``, whose kernels run on a CUDA device alone."""
    module, _, name = place.partition(":")
    if not CUDA:
        return partial(absent, "needs a CUDA device")
    return lambda: adapt(operator.attrgetter(name)(importlib.import_module(module)))


def seeds(outputs: list[Tensor]) -> Sequence[Tensor | None]:
    """Return incoming gradients: of a loss 1, which may have a shortcut."""
    return [None] if outputs[0].dim() == 0 else catalogue.uneven(outputs)


def differentiable(
    make: Callable[[int], Op], n_rows: int, *, also_compiled: bool = False, **peers: Any
) -> Subject:
    """Return the subject of an op with so many rows, forward and backward; few are checked."""
    with torch.device(DEVICE):
        op, few = make(n_rows), make(min(n_rows, N_CHECKED))
    assert op.torch is not None
    exact = results(few.reference, few, torch.float32, seeds)
    makers = {OURS: lambda: op.ours, "torch": lambda: op.torch}
    makers |= {"torch.compile": partial(compiled, op.torch)} | peers
    if also_compiled:
        makers |= {"fasttrain compiled": partial(compiled, op.ours)}
    inputs = [t.to(DTYPE) for t in op.inputs]
    outputs = op.torch(*inputs, *op.constants)
    incoming = seeds([outputs] if isinstance(outputs, Tensor) else list(outputs))

    def verify(name: str, fn: Call) -> None:
        check(name, results(fn, few, DTYPE, seeds), exact, TOLERANCE[DTYPE])

    def call_of(name: str, fn: Call) -> Call:
        # Liger writes a loss's gradient over the logits, which the others must not find there.
        own = [t.clone() if name == "liger" else t.detach() for t in inputs]
        leaves = [t.requires_grad_() for t in own]
        return lambda: both_ways(fn, leaves, op.constants, lambda _: incoming)

    rates = {"gb_per_s": op.n_bytes / 1e9, "tflop_per_s": op.flops / 1e12}
    options = {
        "per_call": {key: amount for key, amount in rates.items() if amount},
        "n_calls": 5 if CUDA and op.n_bytes else 1,
        "warmup": 1 if op.flops else 2,
    }
    return Subject(makers, verify, call_of, options)


def norm(n_rows: int, dim: int) -> Subject:
    place = "liger_kernel.ops.rms_norm:LigerRMSNormFunction.apply"
    return differentiable(
        lambda n: catalogue.rms_norm(NAME, dim, n), n_rows, also_compiled=True,
        liger=peer(place, lambda op: lambda x, w: op(x, w, 1e-6)),
        quack=peer("quack.rmsnorm:rmsnorm", lambda op: partial(op, eps=1e-6)),
    )  # fmt: skip


def rope() -> Subject:
    batch, n_tokens, heads, dim = (8, 8192, (32, 8), 128) if CUDA else (2, 512, (12, 12), 64)

    def heads_first(op: Call) -> Call:  # and it rotates in place: it is given copies
        def call(q: Tensor, k: Tensor, *tables: Tensor) -> Any:
            wide = (torch.cat((table, table), -1)[None].to(q.dtype) for table in tables)
            rotated = op(*(x.transpose(1, 2).clone() for x in (q, k)), *wide)
            return tuple(x.transpose(1, 2) for x in rotated)

        return call

    liger = peer("liger_kernel.ops.rope:LigerRopeFunction.apply", heads_first)
    return differentiable(
        lambda n: catalogue.apply_rope(NAME, dim, n, batch, heads), n_tokens, also_compiled=True,
        **{"liger (with a copy)": liger},
    )  # fmt: skip


def activation(name: str) -> Subject:
    n_rows, n_cols = (32768, 8192) if CUDA else (1024, 1536)
    if name == "relu2":
        return differentiable(lambda n: catalogue.relu_squared(NAME, n_cols, n), n_rows)
    liger = peer("liger_kernel.ops.swiglu:LigerSiLUMulFunction.apply")
    return differentiable(lambda n: catalogue.swiglu(NAME, n_cols, n), n_rows, liger=liger)


def loss_of_logits(n_rows: int, vocab: int) -> Subject:
    return differentiable(
        lambda n: catalogue.cross_entropy(NAME, vocab, n), n_rows,
        liger=peer("liger_kernel.transformers.functional:liger_cross_entropy"),
        quack=peer("quack.cross_entropy:cross_entropy", lambda op: partial(op, reduction="mean")),
    )  # fmt: skip


def torch_chunked() -> Call:
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        absent(f"torch {torch.__version__} has no F.linear_cross_entropy")
    # Its default options are slower and take as much memory.
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=256, chunking_method=None)
    return partial(F.linear_cross_entropy, options=options)


def linear_loss(n_rows: int, dim: int, vocab: int) -> Subject:
    peers = {
        "torch chunked": torch_chunked,
        "liger": peer("liger_kernel.transformers.functional:liger_fused_linear_cross_entropy"),
        "quack": peer("quack.linear_cross_entropy:chunked_linear_cross_entropy"),
        "cut_cross_entropy": peer("cut_cross_entropy:linear_cross_entropy"),
    }
    if not CUDA:
        why = "on a CPU the products dominate: a compiler changes nothing"
        peers["torch.compile"] = partial(absent, why)
    return differentiable(
        lambda n: catalogue.linear_cross_entropy(NAME, vocab, dim, n), n_rows, **peers
    )


# ---- optimizers and products ---------------------------------------------------------------------

Params = list[nn.Parameter]


def optimizers(
    make: Callable[[], Params], ways: Mapping[str, Callable[[Params], Call]],
    close: Callable[[Tensor, Tensor], Any], **options: Any,
) -> Subject:  # fmt: skip
    """Return the subject of a step, after which parameters are close to those of the second way."""
    exact = make()
    list(ways.values())[1](exact)()

    def maker(way: Callable[[Params], Call]) -> tuple[Params, Call]:
        params = make()
        return params, way(params)

    def verify(name: str, made: tuple[Params, Call]) -> None:
        params, step = made
        step()
        for p, q in zip(params, exact, strict=True):
            assert close(p, q) is not False, f"{name} does not step as torch does"

    makers = {name: partial(maker, way) for name, way in ways.items()}
    return Subject(makers, verify, lambda _, made: made[1], {"warmup": 1} | options)


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
    if not CUDA and bf16 and not small:
        pytest.skip("large bf16 states are a GPU's case")

    def ours(params: Params) -> Call:
        optimizer = kernels.FusedAdamW(params, lr=1e-5)

        def step() -> None:
            norm = kernels.grad_norm([p.grad for p in params if p.grad is not None], 1.0)
            optimizer.step(clip_coefficient=norm.clip_coefficient, found_inf=norm.found_inf)

        return step

    def torchs(params: Params, **options: bool) -> Call:
        optimizer = torch.optim.AdamW(params, lr=1e-5, **options)
        return lambda: (nn.utils.clip_grad_norm_(params, 1.0), optimizer.step())

    ways = {OURS: ours, "torch fused": partial(torchs, fused=True)}
    ways["torch foreach"] = partial(torchs, foreach=True)
    if small:  # a loop over tensors: minutes of the large models' time
        ways["torch default"] = partial(torchs, foreach=False)
    layers, dim, vocab = MODELS[model]
    block = [(dim,), (3 * dim, dim), (dim, dim), (dim,), (4 * dim, dim), (dim, 4 * dim)]
    shapes = [(vocab, dim), (1024, dim), *(block * layers), (dim,)]
    dtype = torch.bfloat16 if bf16 else torch.float32
    n_bytes = sum(map(math.prod, shapes)) * dtype.itemsize * 8  # norm 1, step 7
    close = partial(torch.testing.assert_close, rtol=2e-2 if bf16 else 1e-5, atol=1e-6)
    make, rates = partial(parameters, shapes, dtype, 0.02), {"gb_per_s": n_bytes / 1e9}
    return optimizers(make, ways, close, per_call=rates, n_calls=20 if small else 1)


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
    makers = {OURS: lambda: kernels.symmetric_matmul, "torch": lambda: lambda x: torch.bmm(x, x.mT)}
    exact = torch.bmm(x, x.mT)

    def verify(name: str, op: Call) -> None:
        check(name, [op(x)], [exact], TOLERANCE[DTYPE])

    rates = {"tflop_per_s_of_a_full_product": 2 * len(x) * n_rows**3 / 1e12}
    options = {"per_call": rates, "n_calls": 5 if CUDA else 1}
    return Subject(makers, verify, lambda _, op: partial(op, x), options)


# ---- the table -----------------------------------------------------------------------------------

ADAMW = [(model, dtype) for model in MODELS for dtype in ("fp32", "bf16")]
COEFFICIENTS = ("polar_express", "quintic")
# Of each op the file and the name of its figures, what makes it, its sizes on a CPU and on a GPU.
TABLE: Any = (
    ("adamw", "clipped_step", clipped_step, ADAMW[:4], ADAMW),
    # (rows, vocabulary)
    ("cross_entropy", "cross_entropy", loss_of_logits,
     [(2048, 4096), (128, 50304), (128, 50257)],
     [(8192, 128256), (8192, 50304), (8192, 50257), (8192, 32000)]),
    # (rows, dim, vocabulary)
    ("linear_cross_entropy", "linear_cross_entropy", linear_loss,
     [(4096, 256, 1024), (2048, 256, 4096), (768, 128, 65), (512, 768, 50304), (4096, 768, 50304)],
     [(4096, 4096, 128256), (32768, 768, 50304)]),
    # configs/base.toml; GPT-2 small
    ("muon", "muon_step", muon_step,
     [(c, 128) for c in COEFFICIENTS], [(c, 768) for c in COEFFICIENTS]),
    ("muon", "symmetric_matmul", symmetric,
     [(256,), (768,)], [(1024,), (2048,), (4096,), (8192,)]),
    # (rows, dim): those of a model, and of QK-norm
    ("rms_norm", "rms_norm", norm, [(2048, 768), (12288, 64)],
     [(65536, 2048), (32768, 4096), (16384, 8192), (1048576, 128)]),
    ("rope", "rope", rope, [()], [()]),
    ("swiglu", "activation", activation, [("swiglu",), ("relu2",)], [("swiglu",), ("relu2",)]),
)  # fmt: skip
SLOW = {"linear_cross_entropy[4096-768-50304]"}


def cases() -> Any:
    for suite, op, make, cpu, gpu in TABLE:
        for size in gpu if CUDA else cpu:
            name = f"{op}[{'-'.join(map(str, size))}]" if size else op
            marks = pytest.mark.figures(suite, name=name)
            yield pytest.param(name, partial(make, *size), id=name, marks=marks)


@pytest.mark.parametrize(("name", "make"), cases())
def test_op(compare: Any, full: bool, name: str, make: Callable[[], Subject]) -> None:
    if name in SLOW and not full:
        pytest.skip("takes two minutes: --full")
    torch._dynamo.reset()
    torch.manual_seed(0)
    subject = make()
    ops, left_out = gather(subject.makers, subject.verify)
    calls = {rival: subject.call_of(rival, op) for rival, op in ops.items()}
    compare(calls, left_out=left_out, **subject.options)


PEAK = """
import sys, torch
import torch.nn.functional as F
from fasttrain_kernels import linear_cross_entropy
cuda = torch.cuda.is_available()
rows, dim, vocab = (32768, 768, 50304) if cuda else (2048, 64, 50304)
options = {"device": "cuda", "dtype": torch.bfloat16} if cuda else {}
h, w = (torch.randn(n, dim, requires_grad=True, **options) for n in (rows, vocab))
t = torch.randint(0, vocab, (rows,), device=h.device)
loss = linear_cross_entropy
if sys.argv[1] == "torch":
    loss = lambda h, w, t: F.cross_entropy(F.linear(h, w), t)
def peak():  # not ru_maxrss, which a child process inherits
    if cuda:
        return torch.cuda.max_memory_allocated()
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
loss(h[:1], w, t[:1]).backward()  # libraries, thread pools and the weight's gradient
before = torch.cuda.memory_allocated() if cuda else peak()
loss(h, w, t).backward()
print(peak() - before)
"""


@pytest.mark.figures("linear_cross_entropy")
def test_peak_memory(benchmark: Any) -> None:
    """By how much a process grows for one forward and backward of ours and of eager at V=50304."""
    if not CUDA and not Path("/proc/self/status").exists():
        pytest.skip("the peak memory of a process is read from Linux's /proc")

    ours = benchmark.pedantic(run, args=("-c", PEAK, OURS))
    peaks = {OURS: int(ours), "torch": int(run("-c", PEAK, "torch"))}
    benchmark.extra_info["peak_bytes"] = peaks
