# ruff: noqa: I001
"""Our kernels beside those of others, all compiled for sm_90 in one way, without a GPU.

    python -m benchmarks.kernel_peers [OP ...] [--results DIR]

Ours, Liger's and FlashAttention's Triton operations are called as `dev.aot` calls
ours; torch.compile's kernels are read from what Inductor writes, as in `benchmarks.gpu_dry`. Of the
configurations that a kernel tries, the one that spills least, then the shortest, counts. Bytes are
counted in Triton's interpreter, or as Inductor counts them: each address once.
"""

import importlib
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from operator import itemgetter
from types import ModuleType
from typing import Any

from benchmarks import gpu_dry, harness  # before torch, which then compiles for a GPU

import fasttrain_kernels
import torch
import triton
from dev import aot
from fasttrain_kernels import catalogue as ops
from fasttrain_kernels._dispatch import triton_on_cpu
from dev.aot.issue import DEVICES, issue_of
from dev.aot.traffic import mend_interpreter, traffic_of
from triton.runtime import autotuner, interpreter

from fasttrain.preflight.memory import measure_peak

OURS, TARGET = "fasttrain_kernels", "sm_90"
SIZES: dict[str, dict[str, Any]] = {
    "rms_norm": {"dim": 2048, "n_rows": 1024},
    "cross_entropy": {"n_cols": 50304, "n_rows": 64},
    "linear_cross_entropy": {"n_cols": 50304, "dim": 128, "n_rows": 1024},
    "swiglu": {"n_cols": 8192, "n_rows": 64},
    "apply_rope": {"head_dim": 64, "n_tokens": 64, "heads": (32, 8)},
}
FEW, MANY = 2, 8192  # rows that are counted, and for which torch compiles
Call = Callable[..., Any]


def case_of(name: str, call: Call | None, dtype: str = "bf16", n_rows: int = 0) -> ops.Case:
    """Return an op as an implementation does it; None: as we do."""
    sizes = SIZES[name] | ({"n_rows": n_rows} if n_rows and "n_rows" in SIZES[name] else {})

    def make() -> ops.Op:
        op: ops.Op = getattr(ops, name)(dtype, **sizes)
        return op._replace(ours=call or op.ours)

    inputs = make().inputs
    first, last = inputs[0], inputs[-1]
    if name == "linear_cross_entropy":  # of the logits; a chunk of them may be a row
        return ops.Case(name, make, len(first) * len(last), True, len(last), len(last))
    if name == "apply_rope":
        return ops.Case(name, make, first.numel() + last.numel(), True, last.numel())
    return ops.Case(name, make, first.numel(), columns=first.shape[-1])


def others(op: str) -> Iterator[tuple[str, Call, Call]]:
    """Yield name, function and call of the installed implementations of an op, but ours."""
    if find_spec("liger_kernel"):
        from liger_kernel.transformers import functional as liger

        def rope(q: Any, k: Any, cos: Any, sin: Any) -> Any:
            tables = (torch.cat((t, t), -1)[None] for t in (cos, sin))
            return liger.liger_rope(q.transpose(1, 2), k.transpose(1, 2), *tables)

        calls = {"rms_norm": partial(liger.liger_rms_norm, eps=1e-6), "apply_rope": rope}
        names = {"apply_rope": "rope", "linear_cross_entropy": "fused_linear_cross_entropy"}
        function = getattr(liger, f"liger_{names.get(op, op)}")
        yield "Liger", function, calls.get(op, function)
    if find_spec("flash_attn"):
        # Its part in CUDA C++ is not called; where nvcc was missing it is not there.
        sys.modules.setdefault("flash_attn_2_cuda", ModuleType("flash_attn_2_cuda"))
        from flash_attn.layers.rotary import apply_rotary_emb as rotary
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss as loss
        from flash_attn.ops.triton.layer_norm import rms_norm_fn as norm

        ways: dict[str, tuple[Call, Call]] = {
            "rms_norm": (norm, lambda x, weight: norm(x, weight, None)),
            "cross_entropy": (loss, lambda *inputs: loss(*inputs)[0].mean()),
            "apply_rope": (rotary, lambda q, k, *t: (rotary(q, *t), rotary(k, *t))),
        }
        if op in ways:
            yield "FlashAttention", *ways[op]


def every_configuration(self: Any, *args: Any, **kwargs: Any) -> None:
    """Stand in for ``Autotuner.run``, which would time them; the interpreter needs but one."""
    for config in self.configs[: 1 if triton.knobs.runtime.interpret else None]:
        self.fn.run(*args, **kwargs, **config.all_kwargs())


autotuner.Autotuner.run = every_configuration


def cost(made: Any, flags: Mapping[str, Any], warps: int, columns: int, floor: int = 0) -> Any:
    """Read what a compiled kernel costs from its machine code."""
    registers, spills, _, sass = aot._cuda_resources(made.asm["cubin"])
    shared, device = made.metadata.shared, DEVICES[TARGET]
    issue = issue_of(sass, flags, warps, registers, shared, columns, device, floor)
    found = {"registers": registers, "shared": shared, "spills": spills}
    return found | {"instructions": issue.instructions, "programs": issue.programs}


def best(found: Sequence[Any]) -> Any:
    """Return the configuration that spills least, then the one with the fewest instructions."""
    return min(found, key=itemgetter("spills", "instructions"))


def kernels_of(case: ops.Case) -> list[Any]:
    """Compile what a call launches; our kernels that only finish a sum are left out."""
    found: dict[str, list[Any]] = {}
    for launch in aot.capture(aot.TARGETS[TARGET], [case]):
        flags: dict[str, Any] = dict(launch.flags)
        floor = ops.floor_bytes(launch.kernel, launch.signature, flags) or 0
        if launch.function.__module__.startswith(OURS) and not floor:
            continue
        if "pad_hd" in flags:  # Liger's RoPE: a token, all heads
            flags["BLOCK_SIZE"] = (flags["pad_n_qh"] + flags["pad_n_kh"]) * flags["pad_hd"]
        flags["BLOCK_N"] = flags.pop("BLOCK_SIZE", flags.get("BLOCK_N", 1))
        flags["BLOCK_K"] = flags.get("ROTARY_DIM", flags.get("BLOCK_K", 1))
        source = triton.compiler.ASTSource(*launch[2:6])
        made = triton.compile(source, target=aot.TARGETS[TARGET], options=launch.options)
        read = cost(made, flags, launch.options["num_warps"], case.columns, floor)
        found.setdefault(f"{launch.kernel} {flags}", []).append({"name": launch.kernel, **read})
    return [best(configurations) for configurations in found.values()]


def peak_bytes(case: ops.Case) -> int:
    """Return what forward and backward allocate at most, outputs and gradients included."""
    op = case.make()
    inputs = [t.requires_grad_() for t in op.inputs]
    call = partial(ops.both_ways, op.ours, inputs, op.constants, ops.ones)
    with aot._captured(aot.TARGETS[TARGET]), triton_on_cpu():
        return measure_peak(call, torch.device("cpu"))


def by_torch(name: str) -> dict[str, Any]:
    """Compile an op written in torch; return what Inductor's kernels move and cost."""
    torch._dynamo.reset()
    with torch._subclasses.FakeTensorMode(), gpu_dry.DEVICE:
        case = case_of(name, None, n_rows=MANY)
        op = case.make()
        call = torch.compile(op.torch, fullgraph=True, dynamic=False)
        inputs = [t.detach().requires_grad_() for t in op.inputs]
        written = gpu_dry.written_by(lambda: call(*inputs, *op.constants))
    program, kernels = gpu_dry.read(written), []
    for launched, source in program.sources.items():
        numels = [int(n) for n in re.findall(r"^    (?:x|r0_)numel = (\d+)$", source, re.M)]
        part = program.launches[launched] * math.prod(numels) / case.elements
        inner = re.search(r"R0_BLOCK: tl.constexpr = (\d+)", source)
        found = []
        for result in gpu_dry.compile_kernel(source) if part > 0.01 else ():
            sizes = result.config.kwargs
            flags = {"BLOCK_M": sizes.get("XBLOCK", 1)}
            flags["BLOCK_N"] = int(inner[1]) if inner else sizes.get("R0_BLOCK", 1)
            columns = numels[1] if len(numels) > 1 else 0
            read = cost(result.kernel, flags, result.config.num_warps, columns)
            read["instructions"] *= part  # of the op's elements
            found.append({"name": launched.name, **read})
        kernels += [best(found)] if found else []
    return {"bytes": program.counts()["bytes"] / case.elements, "kernels": kernels}


def count(names: Sequence[str]) -> None:
    """Print the bytes an element that Triton implementations move, by op; in the interpreter."""
    mend_interpreter()
    convert, to_tensor = interpreter._implicit_cvt, interpreter.interpreter_semantic.to_tensor
    interpreter._implicit_cvt = lambda x: to_tensor(x) if isinstance(x, float) else convert(x)
    if find_spec("liger_kernel"):  # the interpreter has no libdevice
        norm = importlib.import_module("liger_kernel.ops.rms_norm")
        norm.rsqrt = lambda x: triton.language.math.rsqrt(x)
    moved: dict[str, dict[str, float]] = {name: {} for name in names}
    for name in names:
        for peer, _, call in ((OURS, None, None), *others(name)):
            # Beside 2,048 rows the partial sums of a weight's gradient are small, and left out.
            case = case_of(name, call, n_rows=2048 if name == "rms_norm" else FEW)
            n_bytes = sum(launch.distinct for launch in traffic_of(case))
            moved[name][peer] = n_bytes / case.elements
    print(json.dumps(moved))


def entries(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield what is known of each implementation of some ops."""
    command = ("-m", "benchmarks.kernel_peers", *names)
    counting = ThreadPoolExecutor().submit(harness.run, *command, env={"TRITON_INTERPRET": "1"})
    for name in names:
        own = (OURS, getattr(fasttrain_kernels, name), None)
        for peer, function, call in (own, *others(name)):
            parameters = inspect.signature(function).parameters.values()
            options = [p.name for p in parameters if p.default is not inspect.Parameter.empty]
            dtypes, case = ["bf16"], case_of(name, call)
            for dtype in ("fp16", "fp32"):
                with suppress(Exception):  # of an implementation that does not take it
                    aot.capture(aot.TARGETS[TARGET], [case_of(name, call, dtype, FEW)])
                    dtypes.append(dtype)
            known = {"name": f"{name}, {peer}", "op": name, "peer": peer}
            known |= {"options": options, "dtypes": dtypes}
            known |= {"memory": peak_bytes(case) / case.elements, "kernels": kernels_of(case)}
            yield known | {"bytes": json.loads(counting.result())[name][peer]}
        known = {"name": f"{name}, torch.compile", "op": name, "peer": "torch.compile"}
        yield known | {"options": [], "dtypes": []} | by_torch(name)


if __name__ == "__main__":
    if triton.knobs.runtime.interpret:
        count(sys.argv[1:])
    else:
        gpu_dry.main("kernel_peers", list(SIZES), entries, default=harness.RESULTS)
