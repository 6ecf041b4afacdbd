"""Calls of the public functions that reach every launch configuration, and what each must move.

`aot` compiles the launches that these calls make; `traffic` counts the bytes of the same launches
in Triton's interpreter. Rows are few: neither registers nor bytes an element depend on them.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adamw import FusedAdamW
from ..cross_entropy import cross_entropy
from ..grad_norm import grad_norm
from ..linear_cross_entropy import linear_cross_entropy
from ..rms_norm import rms_norm
from ..rope import apply_rope
from ..swiglu import relu_squared, swiglu
from ..symmetric import symmetric_matmul

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Case(NamedTuple):
    """One call of a public function, with its backward."""

    name: str  # operation, dtype and shape
    run: Callable[[], None]
    elements: int  # of the tensor that the floor is counted for; 0 where bytes do not bound
    # Whether every row of every operand starts on a 16-byte boundary, or the kernel promises wide
    # accesses anyway. Otherwise 16-byte accesses are impossible.
    aligned: bool = True
    smallest: int = 0  # elements of the smallest operand that counts as bulk; 0: ``elements``
    columns: int = 0  # of a row, where the kernel does not know it when compiled; 0: it does


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
        weight = 8 + size("P") if flags["HAS_MASTER"] else 2 * size("P")
        return weight + size("G") + 2 * size("M") + 2 * size("V")
    if kernel == "_sum_squares_kernel":
        return size("DTYPE")
    accesses = {
        "_rms_norm_fwd_kernel": 2 + 2 * flags.get("HAS_RESIDUAL", 0),
        "_rms_norm_bwd_kernel": 3 + flags.get("HAS_DH", 0),
        "_swiglu_fwd_kernel": 3,
        "_swiglu_bwd_kernel": 5,
        "_relu_squared_fwd_kernel": 2,
        "_relu_squared_bwd_kernel": 3,
        "_rope_kernel": 2,
        "_scale_kernel": 0,  # a factor of 1
    }
    first = next((name for name in signature if sizes.get(signature[name])), "")
    return accesses[kernel] * size(first) if kernel in accesses else None


def _grads(outputs: Any, inputs: list[Tensor]) -> None:
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    incoming = [torch.ones_like(o) for o in outputs]
    torch.autograd.grad(outputs, inputs, incoming, allow_unused=True)


def _cross_entropy(dtype: str, n_cols: int, what: str, **options: Any) -> Case:
    n_rows = 2

    def run() -> None:
        chosen = dict(options)
        if chosen.pop("weights", False):
            chosen.update(class_weight=torch.ones(n_cols), token_weight=torch.ones(n_rows))
        logits = torch.zeros(n_rows, n_cols, dtype=_DTYPES[dtype], requires_grad=True)
        targets = torch.zeros(n_rows, dtype=torch.int64)
        if what == "evaluation":
            with torch.no_grad():
                cross_entropy(logits, targets, **chosen)
            return
        loss = cross_entropy(logits, targets, **chosen)
        if "forward" not in what:  # backward launches a shorter variant, compiled for some widths
            _grads(loss[0] if isinstance(loss, tuple) else loss, [logits])

    name = f"cross_entropy {dtype} V={n_cols} {what}".strip()
    return Case(name, run, n_rows * n_cols, columns=n_cols)


def _cross_entropy_cases() -> Iterator[Case]:
    for dtype in ("bf16", "fp32"):
        for n_cols in (131, 32000, 50304, 128256):
            yield _cross_entropy(dtype, n_cols, "" if n_cols == 128256 else "forward")
        yield _cross_entropy(dtype, 50257, "" if dtype == "bf16" else "forward")
    yield _cross_entropy("fp16", 50257, "")  # loss and gradient apart
    yield _cross_entropy("fp16", 32000, "evaluation")
    # The widest rows that are held on chip with edges, with z-loss, and with other options.
    yield _cross_entropy("bf16", 16001, "forward")
    yield _cross_entropy("fp32", 8001, "forward")
    for dtype in ("bf16", "fp32"):
        yield _cross_entropy(dtype, 16384, "z-loss forward", z_loss=1e-4)
    yield _cross_entropy("bf16", 128256, "z-loss", z_loss=1e-4)
    every = {"z_loss": 1e-4, "label_smoothing": 0.1, "softcap": 30.0, "weights": True}
    for dtype, n_cols in (("bf16", 8192), ("bf16", 128256), ("fp32", 8001), ("fp32", 50257)):
        what = "every option" if n_cols in (8001, 128256) else "every option forward"
        yield _cross_entropy(dtype, n_cols, what, return_accuracy=True, **every)
    yield _cross_entropy("bf16", 50257, "none, every option", reduction="none", **every)
    yield _cross_entropy("bf16", 128256, "none", reduction="none")


def _linear_cross_entropy(dtype: str, n_cols: int) -> Case:
    def run() -> None:
        hidden = torch.zeros(2, 16, dtype=_DTYPES[dtype], requires_grad=True)
        weight = torch.zeros(n_cols, 16, dtype=_DTYPES[dtype], requires_grad=True)
        _grads(linear_cross_entropy(hidden, weight, torch.zeros(2).long()), [hidden, weight])

    return Case(f"linear_cross_entropy {dtype} V={n_cols}", run, 2 * n_cols)


def _rms_norm(dtype: str, dim: int, *, residual: bool = False) -> Case:
    n_rows = 16 if dim <= 1024 else 4 if dim <= 8192 else 2

    def run() -> None:
        x, r = (torch.ones(n_rows, dim, dtype=_DTYPES[dtype], requires_grad=True) for _ in range(2))
        weight = torch.ones(dim, requires_grad=True)
        _grads(rms_norm(x, weight, residual=r if residual else None), [x, weight])

    name = f"rms_norm {dtype} D={dim}{' residual' if residual else ''}"
    return Case(name, run, n_rows * dim, dim * _DTYPES[dtype].itemsize % 16 == 0)


def _rms_norm_cases() -> Iterator[Case]:
    # Up to 8192 columns are one tile backward, up to 16384 forward; longer rows go in chunks.
    for dim in (64, 1000, 4096):
        yield _rms_norm("bf16", dim)
    for dim in (128, 131, 4096, 16384):
        yield _rms_norm("fp32", dim)
    yield _rms_norm("fp16", 4096)
    for dtype, dim in (("bf16", 768), ("bf16", 8192), ("bf16", 32768), ("fp32", 8192)):
        yield _rms_norm(dtype, dim, residual=True)


def _elementwise(op: Callable[..., Tensor], dtype: str, n_inputs: int, *, halves: bool) -> Case:
    n_rows, n_cols = 4, 2048

    def run() -> None:
        fused = torch.ones(n_rows, 2 * n_cols, dtype=_DTYPES[dtype], requires_grad=True)
        apart = [torch.ones_like(fused[:, :n_cols], requires_grad=True) for _ in range(n_inputs)]
        inputs = list(fused.chunk(2, dim=1))[:n_inputs] if halves else apart
        _grads(op(*inputs), inputs)

    layout = " halves of one projection" if halves else ""
    return Case(f"{op.__name__} {dtype}{layout}", run, n_rows * n_cols)


def _rope(dtype: str, head_dim: int) -> Case:
    n_tokens = 16

    def run() -> None:
        q = torch.ones(2, n_tokens, 4, head_dim, dtype=_DTYPES[dtype], requires_grad=True)
        k = torch.ones(2, n_tokens, 2, head_dim, dtype=_DTYPES[dtype], requires_grad=True)
        table = torch.ones(n_tokens, head_dim // 2)
        _grads(apply_rope(q, k, table, table.clone()), [q, k])

    elements = 2 * n_tokens * 6 * head_dim
    return Case(f"apply_rope {dtype} K={head_dim}", run, elements, smallest=elements // 3)


def _adamw(dtype: str, what: str, *, aligned: bool = True, **options: Any) -> Case:
    n = 2 * 8192 if aligned else 2 * 8192 + 5

    def run() -> None:
        storage = torch.ones(n + 1, dtype=_DTYPES[dtype])
        param = torch.nn.Parameter(storage[:n] if aligned else storage[1:])
        param.grad = torch.ones_like(param)
        chosen = dict(options)
        scalars: dict[str, Any] = {}
        if chosen.pop("scalars", False):
            one = torch.ones(())
            scalars = {"clip_coefficient": one, "grad_scale": one, "found_inf": torch.zeros(())}
        FusedAdamW([param], **chosen).step(**scalars)

    return Case(f"FusedAdamW {dtype} {what}".strip(), run, n, aligned)


def _adamw_cases() -> Iterator[Case]:
    yield _adamw("fp32", "")
    yield _adamw("fp32", "clip, scale, skip", scalars=True)
    yield _adamw("fp32", "bf16 states", state_dtype=torch.bfloat16)
    yield _adamw("fp32", "unaligned", aligned=False)
    yield _adamw("bf16", "")
    yield _adamw("bf16", "stochastic", stochastic_rounding=True)
    yield _adamw("bf16", "master", master_weights=True, state_dtype=torch.float32)
    yield _adamw("fp16", "")


def _grad_norm(dtype: str, *, aligned: bool = True) -> Case:
    n = 2 * 8192

    def run() -> None:
        storage = torch.ones(n + 1, dtype=_DTYPES[dtype])
        grad_norm([storage[:n] if aligned else storage[1:]], 1.0)

    return Case(f"grad_norm {dtype}{'' if aligned else ' unaligned'}", run, n, aligned)


def _symmetric(dtype: str, rows: int, cols: int, *, add: bool = False) -> Case:
    def run() -> None:
        x = torch.ones(1, rows, cols, dtype=_DTYPES[dtype])
        c = torch.ones(1, rows, rows, dtype=_DTYPES[dtype])
        symmetric_matmul(x, add=c if add else None, alpha=0.5, beta=0.5)

    name = f"symmetric_matmul {dtype} {rows}x{cols}{' added' if add else ''}"
    return Case(name, run, 0)


def _cases() -> Iterator[Case]:
    yield from _cross_entropy_cases()
    yield _linear_cross_entropy("bf16", 50257)
    yield from _rms_norm_cases()
    for dtype in _DTYPES:
        yield _elementwise(swiglu, dtype, 2, halves=False)
        yield _elementwise(relu_squared, dtype, 1, halves=False)
    yield _elementwise(swiglu, "bf16", 2, halves=True)
    for dtype, head_dim in (("bf16", 64), ("bf16", 128), ("fp32", 128), ("fp16", 64)):
        yield _rope(dtype, head_dim)
    yield from _adamw_cases()
    for dtype in _DTYPES:
        yield _grad_norm(dtype)
    yield _grad_norm("fp32", aligned=False)
    yield _symmetric("bf16", 256, 256)
    yield _symmetric("bf16", 256, 256, add=True)
    yield _symmetric("fp16", 256, 256)
    yield _symmetric("fp32", 128, 128, add=True)


CASES: tuple[Case, ...] = tuple(_cases())
