"""Every op with made-up inputs: what is compiled ahead of time, counted, benchmarked and tested.

A function for each op makes an `Op` of given sizes. `CASES` are calls that reach every launch
configuration: `aot` compiles their launches and counts the bytes that they move. Tensors are made
on torch's default device (``with torch.device(...)``), from the state of its random generator.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

kernels: Any = import_module(__name__.rpartition(".")[0])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Outputs = Tensor | tuple[Tensor, ...]
Seeds = Callable[[list[Tensor]], Sequence[Tensor | None]]


class Op(NamedTuple):
    """A call. Its inputs get gradients if its outputs have any; its constants never do."""

    ours: Callable[..., Outputs]
    reference: Callable[..., Outputs]  # the same formula in plain torch, in any dtype
    inputs: tuple[Tensor, ...]
    constants: tuple[Any, ...] = ()
    torch: Callable[..., Outputs] | None = None  # what a model written with torch alone calls
    n_bytes: int = 0  # that forward and backward must move at least
    flops: int = 0
    in_fp64: bool = False  # whether the reference computes in fp64 whatever the dtype
    rounds_once: bool = True


def uneven(outputs: list[Tensor]) -> list[Tensor]:
    """Return gradients for outputs: the same in every dtype, never 1, which has a shortcut."""
    wide = [
        torch.arange(o.numel(), device=o.device).to(torch.float32).view_as(o).sin() + 1.5
        for o in outputs
    ]
    return [w.bfloat16().to(o) for w, o in zip(wide, outputs, strict=True)]


def ones(outputs: list[Tensor]) -> list[Tensor]:
    """Return gradients of 1."""
    return [torch.ones_like(o) for o in outputs]


def both_ways(
    fn: Callable[..., Outputs], inputs: Sequence[Tensor], constants: Sequence[Any], seeds: Seeds
) -> list[Tensor]:
    """Return the outputs of a call, and the gradients of its inputs where it has any."""
    found = fn(*inputs, *constants)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    ends = [o for o in outputs if o.requires_grad]
    return outputs + (list(torch.autograd.grad(ends, inputs, seeds(ends))) if ends else [])


def results(
    fn: Callable[..., Outputs], op: Op, dtype: torch.dtype | None = None, seeds: Seeds = uneven
) -> list[Tensor]:
    """Return outputs and gradients for the op's inputs, in ``dtype`` where one is given."""
    inputs = [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in op.inputs]
    return [t.detach() for t in both_ways(fn, inputs, op.constants, seeds)]


def _normal(dtype: str, *shape: int, size: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float32) * size).to(DTYPES[dtype])


def _uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float32)


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _both(name: str, call: Callable[..., Any] | None = None) -> tuple[Any, Any]:
    """Return the op of that name and its reference, as ``call`` calls them."""
    ours, reference = getattr(kernels, name), getattr(kernels, f"{name}_reference")
    return (partial(call, ours), partial(call, reference)) if call else (ours, reference)


def cross_entropy(
    dtype: str, n_cols: int, n_rows: int = 2, *, every: bool = False, **options: Any
) -> Op:
    """Cross-entropy; the last of more than two rows is ignored."""
    targets = torch.randint(n_cols, (n_rows,))
    if n_rows > 2:
        targets[-1] = -100
    if every:
        options |= {"z_loss": 1e-3, "label_smoothing": 0.1, "softcap": 8.0, "return_lse": True}
        options |= {"class_weight": _uniform(n_cols), "token_weight": _uniform(n_rows)}
    logits = _normal(dtype, n_rows, n_cols, size=3.0)
    calls = _both("cross_entropy", lambda fn, *inputs: fn(*inputs, **options))
    return Op(*calls, (logits,), (targets,), F.cross_entropy, 2 * logits.nbytes)


def linear_cross_entropy(dtype: str, n_cols: int, dim: int = 64, n_rows: int = 16) -> Op:
    """The loss of a linear layer, in chunks."""
    inputs = _normal(dtype, n_rows, dim), _normal(dtype, n_cols, dim, size=dim**-0.5)
    targets = torch.randint(n_cols, (n_rows,))

    def usual(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), targets)

    flops = 6 * n_rows * dim * n_cols
    calls = _both("linear_cross_entropy")
    return Op(*calls, inputs, (targets,), usual, flops=flops, rounds_once=False)


def rms_norm(dtype: str, dim: int, n_rows: int = 7, *, residual: bool = False) -> Op:
    """RMSNorm with an fp32 weight; with a residual it has two outputs."""
    inputs = [_normal(dtype, n_rows, dim), 1 + _normal("fp32", dim, size=0.1)]
    inputs += [_normal(dtype, n_rows, dim)] * residual

    def call(fn: Any, x: Tensor, weight: Tensor, *more: Tensor) -> Any:
        return fn(x, weight, residual=more[0]) if more else fn(x, weight)

    def usual(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, 1e-6)

    moved = 5 * inputs[0].nbytes  # x, y; dy, x, dx
    return Op(*_both("rms_norm", call), tuple(inputs), (), usual, moved)


def _elementwise(name: str, usual: Callable[..., Tensor], *inputs: Tensor) -> Op:
    moved = 3 * len(inputs) + 2  # x, y; dy, x, dx
    return Op(*_both(name), inputs, (), usual, moved * inputs[0].nbytes)


def swiglu(dtype: str, n_cols: int, n_rows: int = 3, *, halves: bool = False) -> Op:
    """SwiGLU of two tensors, or of the halves of one projection."""
    if halves:
        fused = _normal(dtype, n_rows, 2 * n_cols)
        return Op(*_both("swiglu", lambda fn, x: fn(*x.chunk(2, dim=1))), (fused,))
    gate, up = _normal(dtype, n_rows, n_cols), _normal(dtype, n_rows, n_cols)
    return _elementwise("swiglu", lambda gate, up: F.silu(gate) * up, gate, up)


def relu_squared(dtype: str, n_cols: int, n_rows: int = 3) -> Op:
    """The squared ReLU."""
    x = _normal(dtype, n_rows, n_cols)
    return _elementwise("relu_squared", lambda x: F.relu(x).square(), x)


# Those of one shape whose kernels are _<op>_fwd_kernel and _<op>_bwd_kernel: `CASES` and tests
# take them from here.
ELEMENTWISE: tuple[Callable[..., Op], ...] = (swiglu, relu_squared)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return what models write: the convention of Llama, in the input's dtype."""
    c, s = (torch.cat((t, t), -1).unsqueeze(-2).to(x.dtype) for t in (cos, sin))
    lo, hi = x.chunk(2, -1)
    return x * c + torch.cat((-hi, lo), -1) * s


def apply_rope(
    dtype: str, head_dim: int, n_tokens: int = 5, batch: int = 2, heads: tuple[int, int] = (4, 2)
) -> Op:
    """RoPE of queries and keys, which have so many heads each."""
    angle = _uniform(n_tokens, head_dim // 2) * 6.283
    q, k = (_normal(dtype, batch, n_tokens, n, head_dim) for n in heads)

    def usual(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotate_half(q, cos, sin), rotate_half(k, cos, sin)

    moved = 4 * (q.nbytes + k.nbytes)
    return Op(*_both("apply_rope"), (q, k), (angle.cos(), angle.sin()), usual, moved)


def adamw(dtype: str, n: int, *, offset: int = 0, scalars: bool = False, **options: Any) -> Op:
    """The second step of AdamW: parameter, moments and master weight after it."""
    lr = 0.1
    values = [_normal(dtype, n + offset)[offset:] for _ in range(2)]
    state_dtype = options.get("state_dtype") or DTYPES[dtype]
    moments = [_normal("fp32", n, size=0.1).to(state_dtype), _uniform(n).to(state_dtype)]
    given = {"clip_coefficient": _scalar(0.5), "grad_scale": _scalar(2.0)}
    given["found_inf"] = _scalar(0.0)

    def ours(param: Tensor, grad: Tensor, m: Tensor, v: Tensor) -> Outputs:
        leaf = nn.Parameter(param.detach().new_empty(n + offset)[offset:])
        leaf.data.copy_(param)
        leaf.grad = grad.detach()
        optimizer = kernels.FusedAdamW([leaf], lr=lr, **options)
        state = optimizer.state[leaf] = optimizer.new_state(leaf)
        state["exp_avg"].copy_(m.detach())
        state["exp_avg_sq"].copy_(v.detach())
        state["step"].fill_(1)
        optimizer.step(**given if scalars else {})
        names = [name for name in ("exp_avg", "exp_avg_sq", "master") if name in state]
        return (leaf.detach(), *(state[name] for name in names))

    def exact(param: Tensor, grad: Tensor, m: Tensor, v: Tensor) -> Any:
        scale = 0.25 if scalars else 1.0
        with torch.no_grad():
            found: Any = kernels.adamw_reference(param, grad, m, v, 2, lr=lr, scale=scale)
        return found + found[:1] * options.get("master_weights", False)

    return Op(ours, exact, (*values, *moments), in_fp64=True)


def muon(dtype: str, rows: int, cols: int, *, products: str = "fp32", scalars: bool = False) -> Op:
    """A step of Muon: two matrices and their momenta after it."""
    lr, decay, scale = 0.02, 0.1, 0.2 * max(rows, cols) ** 0.5
    given = {"clip_coefficient": _scalar(0.5), "found_inf": _scalar(0.0)}
    lr_tensor = _scalar(lr)

    def ours(*tensors: Tensor) -> Outputs:
        params, grads, momenta = ([t.detach() for t in tensors[i::3]] for i in range(3))
        leaves = [nn.Parameter(p.clone()) for p in params]
        rate = lr_tensor if scalars else lr
        options = {"weight_decay": decay, "ns_dtype": DTYPES[products]}
        optimizer = kernels.Muon(leaves, rate, **options)
        for leaf, grad, momentum in zip(leaves, grads, momenta, strict=True):
            leaf.grad, optimizer.state[leaf]["momentum_buffer"] = grad, momentum
        optimizer.step(**given if scalars else {})
        return (*(leaf.detach() for leaf in leaves), *momenta)

    def exact(*tensors: Tensor) -> Outputs:
        after, moved = [], []
        for p, g, m in zip(*(tensors[i::3] for i in range(3)), strict=True):
            g = g.detach() * (0.5 if scalars else 1.0)
            moved.append(0.95 * m.detach() + 0.05 * g)
            change = kernels.newton_schulz_reference(0.95 * moved[-1] + 0.05 * g)
            after.append((1 - lr * decay) * p.detach() - lr * scale * change)
        return (*after, *moved)

    inputs = tuple(_normal(dtype, rows, cols) for _ in range(6))
    return Op(ours, exact, inputs, in_fp64=True)


def grad_norm(dtype: str, sizes: Sequence[int], offset: int = 0) -> Op:
    """The norm of tensors and the coefficient that clips it."""
    inputs = tuple(_normal(dtype, n) for n in sizes)

    def call(fn: Callable[..., Any], *tensors: Tensor) -> Outputs:
        placed = [t.new_empty(t.numel() + offset)[offset:].copy_(t.detach()) for t in tensors]
        found = fn(placed, 1.0)
        return found.norm, found.clip_coefficient

    return Op(*_both("grad_norm", call), inputs, in_fp64=True)


def symmetric_matmul(dtype: str, rows: int, cols: int, n: int = 2, *, add: bool = False) -> Op:
    """α X Xᵀ + β C."""
    x = _normal(dtype, n, rows, cols, size=cols**-0.5)
    c = _normal(dtype, n, rows, rows)

    def call(fn: Any, x: Tensor, *added: Tensor) -> Any:
        more = {"add": added[0].detach()} if added else {}
        return fn(x.detach(), alpha=0.5, beta=0.25, **more)

    inputs = (x, c + c.mT) if add else (x,)
    return Op(*_both("symmetric_matmul", call), inputs, in_fp64=True)


# ---- launches ------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One call of a public function, with its backward unless ``mode`` says otherwise."""

    name: str  # operation, dtype and shape
    make: Callable[[], Op]
    elements: int = 0  # of the tensor for which the byte floor is counted; 0: bytes do not bound
    # Whether every row of every operand starts on a 16-byte boundary, or the kernel promises wide
    # accesses anyway. Otherwise 16-byte accesses are impossible.
    aligned: bool = True
    smallest: int = 0  # elements of the smallest operand that counts as bulk; 0: ``elements``
    columns: int = 0  # of a row, where the kernel does not know it when compiled; 0: it does
    mode: str = ""  # "forward": of a call that could go backward; "evaluation": of one that cannot

    def run(self) -> None:
        """Make the inputs and the call; the incoming gradients are 1."""
        op = self.make()
        inputs = [t.requires_grad_(self.mode != "evaluation") for t in op.inputs]
        if self.mode:
            op.ours(*inputs, *op.constants)
        else:
            both_ways(op.ours, inputs, op.constants, ones)


def floor_bytes(kernel: str, signature: Mapping[str, str], flags: Mapping[str, Any]) -> int | None:
    """Return the fewest bytes an element that a launch can move, or None where bytes do not bound.

    ``signature`` has the types of its arguments ("*bf16" for a pointer), ``flags`` the compile-time
    arguments by name.
    """
    sizes = {"*fp32": 4, "*bf16": 2, "*fp16": 2, "fp32": 4, "bf16": 2, "fp16": 2}

    def size(name: str) -> int:
        # A pointer has its dtype in the signature; pointers in a table are named by an argument.
        return sizes[signature[name] if signature.get(name) in sizes else str(flags[name])]

    if kernel == "cross_entropy_kernel":
        # With an incoming gradient of 1 the gradient is already there.
        return 0 if flags["SKIP_UNIT"] else size("logits_ptr") * (1 + flags["WRITE_GRAD"])
    if kernel == "adamw_kernel":
        weight = 2 * size("P") + (8 if flags["HAS_MASTER"] else 0)
        return weight + size("G") + 2 * size("M") + 2 * size("V")
    if kernel == "_sum_squares_kernel":
        return size("DTYPE")
    if kernel == "muon_direction_kernel":
        return size("G") + 2 * size("M") + size("out_ptr")
    if kernel == "muon_apply_kernel":
        return 2 * size("W") + size("change_ptr")
    if kernel.startswith(tuple(f"_{op.__name__}_" for op in ELEMENTWISE)):
        return sum(sizes[kind] for kind in signature.values() if kind.startswith("*"))
    accesses = {
        "_rms_norm_fwd_kernel": 2 + 2 * flags.get("HAS_RESIDUAL", 0),
        "_rms_norm_bwd_kernel": 3 + flags.get("HAS_DH", 0),
        "_rope_kernel": 2,
        "_scale_kernel": 0,  # a factor of 1
    }
    first = next((name for name in signature if sizes.get(signature[name])), "")
    return accesses[kernel] * size(first) if kernel in accesses else None


def _cross_entropy_cases() -> Iterator[Case]:
    def case(dtype: str, n_cols: int, what: str = "", **options: Any) -> Case:
        make = partial(cross_entropy, dtype, n_cols, **options)
        words = what.split()
        mode = next((word for word in words if word in ("forward", "evaluation")), "")
        name = " ".join(["cross_entropy", dtype, f"V={n_cols}", *words])
        return Case(name, make, 2 * n_cols, columns=n_cols, mode=mode)

    # Backward launches a shorter variant, which is compiled for some widths.
    for dtype in ("bf16", "fp32"):
        for n_cols in (131, 32000, 50304, 128256):
            yield case(dtype, n_cols, "" if n_cols == 128256 else "forward")
        yield case(dtype, 50257, "" if dtype == "bf16" else "forward")
    yield case("fp16", 50257)  # loss and gradient apart
    yield case("fp16", 32000, "evaluation")
    # The widest rows that are held on chip with edges, with z-loss, and with other options.
    yield case("bf16", 16001, "forward")
    yield case("fp32", 8001, "forward")
    yield case("bf16", 16384, "z-loss forward", z_loss=1e-4)
    yield case("bf16", 128256, "z-loss", z_loss=1e-4)
    for dtype, n_cols in (("bf16", 8192), ("bf16", 128256), ("fp32", 8001), ("fp32", 50257)):
        what = "every option" if n_cols in (8001, 128256) else "every option forward"
        yield case(dtype, n_cols, what, return_accuracy=True, every=True)
    yield case("bf16", 50257, "none, every option", reduction="none", every=True)
    yield case("bf16", 128256, "none", reduction="none")


def _cases() -> Iterator[Case]:
    yield from _cross_entropy_cases()
    make: Callable[[], Op] = partial(linear_cross_entropy, "bf16", 50257, 16, 2)
    yield Case("linear_cross_entropy bf16 V=50257", make, 2 * 50257)

    # Up to 8192 columns are one tile backward, up to 16384 forward; longer rows go in chunks.
    for dtype, dim, what in (
        *(("bf16", dim, "") for dim in (64, 1000, 4096)),
        *(("fp32", dim, "") for dim in (128, 131, 4096, 16384)),
        ("fp16", 4096, ""),
        *(("bf16", dim, " residual") for dim in (768, 8192, 32768)),
        ("fp32", 8192, " residual"),
    ):
        n_rows = 16 if dim <= 1024 else 4 if dim <= 8192 else 2
        make = partial(rms_norm, dtype, dim, n_rows, residual=bool(what))
        aligned = dim * DTYPES[dtype].itemsize % 16 == 0
        yield Case(f"rms_norm {dtype} D={dim}{what}", make, n_rows * dim, aligned)
    for dtype in DTYPES:
        for op in ELEMENTWISE:
            yield Case(f"{op.__name__} {dtype}", partial(op, dtype, 2048, 4), 4 * 2048)
    make = partial(swiglu, "bf16", 2048, 4, halves=True)
    yield Case("swiglu bf16 halves of one projection", make, 4 * 2048)
    for dtype, head_dim in (("bf16", 64), ("bf16", 128), ("fp32", 128), ("fp16", 64)):
        make, elements = partial(apply_rope, dtype, head_dim, 16), 2 * 16 * 6 * head_dim
        yield Case(f"apply_rope {dtype} K={head_dim}", make, elements, smallest=elements // 3)
    n = 2 * 8192
    for dtype, what, options in (
        ("fp32", "", {}),
        ("fp32", " clip, scale, skip", {"scalars": True}),
        ("fp32", " bf16 states", {"state_dtype": torch.bfloat16}),
        ("fp32", " unaligned", {"offset": 1}),
        ("bf16", "", {}),
        ("bf16", " stochastic", {"stochastic_rounding": True}),
        ("bf16", " master", {"master_weights": True, "state_dtype": torch.float32}),
        ("fp16", "", {}),
    ):
        size = n + 5 if "offset" in options else n
        make = partial(adamw, dtype, size, **options)
        yield Case(f"FusedAdamW {dtype}{what}", make, size, "offset" not in options)
    for dtype, products, scalars in (
        ("fp32", "bf16", False),
        ("fp32", "fp32", True),
        ("bf16", "bf16", False),
    ):
        what = " clip, skip, lr on the device" if scalars else ""
        make = partial(muon, dtype, 64, 128, products=products, scalars=scalars)
        yield Case(f"Muon {dtype}{what}", make, n)
    for dtype, what, offset in (*((dtype, "", 0) for dtype in DTYPES), ("fp32", " unaligned", 1)):
        make = partial(grad_norm, dtype, [n], offset)
        yield Case(f"grad_norm {dtype}{what}", make, n, not offset)
    for dtype, add in (("bf16", ""), ("bf16", " added"), ("fp16", "")):
        make = partial(symmetric_matmul, dtype, 4096, 64, add=bool(add))
        yield Case(f"symmetric_matmul {dtype} 2x4096x64{add}", make)


CASES: tuple[Case, ...] = tuple(_cases())
