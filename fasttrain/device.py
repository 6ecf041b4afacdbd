"""Where and in which precision a run computes, and whether its loss is compiled."""

import contextlib
import ctypes
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from fasttrain_kernels._torch import (
    compile_cache_counts,
    compile_deterministically,
    native_bf16,
)

from fasttrain.block_cpu import fits
from fasttrain.config import TrainConfig, UserError
from fasttrain.config_keys import refuse

__all__ = [
    "Precision",
    "compile_cache_use",
    "compile_function",
    "keep_compiled",
    "keep_freed_memory",
    "make_deterministic",
    "resolve_compile",
    "resolve_device",
    "resolve_precision",
]

# Four layers, from a cold cache: 28 s as one graph against 17 s as one block, but steps 10 %
# shorter (width 128, two Zen 3 cores that were not idle).
MAX_LAYERS_OF_ONE_CPU_GRAPH = 6

P = ParamSpec("P")
R = TypeVar("R")


def resolve_device(name: str) -> torch.device:
    """Return the device that ``run.device`` names; ``auto`` is CUDA where there is one, else CPU.

    Raises:
        UserError: the device is not there.
    """
    n_cuda = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if n_cuda else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= n_cuda:
        found = f"{n_cuda} found" if n_cuda else "none found"
        raise UserError(
            f"run.device = {name!r}: no such CUDA device ({found}); use run.device=cpu or auto"
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", 0)  # torch.cuda.set_device wants an index
    return device


def make_deterministic() -> None:
    """Have every operation of this process give the same bits each time; before CUDA starts.

    One that cannot raises torch's error. SDPA then leaves cuDNN's kernel out, and the backward of
    FlashAttention and of the memory-efficient kernel adds in a fixed order, as FlexAttention's
    always does. What is compiled takes no reduction by how fast it was.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    fill: Any = torch.utils.deterministic  # which torch's stubs know nothing of
    fill.fill_uninitialized_memory = False  # nothing here reads such
    compile_deterministically()


@dataclass(frozen=True, slots=True)
class Precision:
    """Parameters and their gradients are always fp32; matrix products run in ``compute``."""

    name: str  # fp32 | tf32 | bf16 | fp16
    compute: torch.dtype
    device_type: str

    @property
    def scaled(self) -> bool:
        """Whether gradients need a scale: fp16 alone has too few exponent bits for them."""
        return self.name == "fp16"

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which forward passes run."""
        if self.compute is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.compute)


def resolve_precision(name: str, device: torch.device) -> Precision:
    """Return the precision that ``run.dtype`` names on ``device``.

    ``auto`` is bf16 where the hardware multiplies it natively; else fp16 on CUDA and fp32 on CPU.
    On CUDA it also sets the process-wide precision of fp32 matrix products: TF32 unless ``fp32``.
    """
    if name == "auto":
        fallback = "fp16" if device.type == "cuda" else "fp32"
        name = "bf16" if native_bf16(device) else fallback
    if name == "tf32" and device.type != "cuda":
        raise UserError(f"run.dtype = 'tf32' needs a CUDA device, got {device}; use fp32 or auto")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if name == "fp32" else "high")
    dtypes = {"fp32": torch.float32, "tf32": torch.float32}
    dtypes |= {"bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in dtypes:
        refuse("run.dtype", name, "is not implemented; add it to resolve_precision")
    return Precision(name, dtypes[name], device.type)


def _has_cpp_compiler() -> bool:
    return any(shutil.which(c) for c in (os.environ.get("CXX"), "g++", "clang++") if c)


def keep_freed_memory() -> None:
    """Make glibc's malloc keep large freed blocks instead of returning them to the system.

    By default each activation above 32 MiB at the most is mapped anew, and the kernel clears its
    pages at every step. No effect where the C library has no ``mallopt``. Two Zen 3 cores, medians
    of interleaved processes: system time falls from 5.0 to 1.3 ms in a step of base.toml of 280 ms
    (wall clock: no difference above the noise of 3 %), and from 82 to 4 ms in a step of 1,150 ms
    with 64 rows, uncompiled.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


def resolve_compile(config: TrainConfig, device: torch.device) -> str:
    """Return how a run compiles: ``off``, ``c++``, ``blocks``, or a mode of ``run.compile``.

    ``c++`` is the block that is written in C++, on a CPU where the config `fits` it, and else
    ``off``. ``auto`` compiles everything as one graph on CUDA. On a CPU it is ``c++`` where that
    fits, which is faster and built in seconds; else, with a C++ compiler, one graph up to
    `MAX_LAYERS_OF_ONE_CPU_GRAPH` layers, and beyond one block that is compiled once and run for
    all: the time to compile then does not grow with the depth.
    """
    mode = config.run.compile
    in_cpp = device.type == "cpu" and fits(config)
    if mode == "c++":
        return mode if in_cpp else "off"
    if mode == "auto" and device.type == "cpu":
        if in_cpp:
            return "c++"
        shallow = config.model.n_layers <= MAX_LAYERS_OF_ONE_CPU_GRAPH
        return ("default" if shallow else "blocks") if _has_cpp_compiler() else "off"
    if mode == "auto":
        return "default"
    if mode != "off" and device.type == "cpu":
        if not _has_cpp_compiler():
            raise UserError(
                f"run.compile = {mode!r} needs a C++ compiler on a CPU and none is on the PATH; "
                "install g++ or use run.compile=off"
            )
        if mode != "default":
            raise UserError(f"run.compile = {mode!r} needs a CUDA device; use default, auto or off")
    return mode


def compiles_evaluation(device: torch.device) -> bool:
    """Return whether evaluation is compiled where training is.

    On a CPU it takes longer to compile than it saves: with base.toml 30 s, and all of the
    evaluation takes 15 s as it is (two Zen 4 cores, bf16, torch 2.13).
    """
    return device.type == "cuda"


def compile_function(fn: Callable[P, R], mode: str) -> Callable[P, R]:
    """Return ``fn`` compiled as one graph of static shapes; a graph break is an error.

    Its code trusts operations to return the sizes that they promise, and modules of Python to keep
    their globals, instead of looking at each call: of a step of 4 layers 0.4 ms (two Zen 3 cores).
    Arguments, parameters and the attributes of modules are looked at.
    """
    if mode != "default":  # a mode of torch.compile goes with no options
        inductor_mode = "reduce-overhead" if mode == "cuda-graphs" else mode
        return torch.compile(fn, fullgraph=True, dynamic=False, mode=inductor_mode)
    options: dict[str, Any] = {
        "size_asserts": False,
        "alignment_asserts": False,
        "guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe,
    }
    return torch.compile(fn, fullgraph=True, dynamic=False, options=options)


def keep_compiled(folder: Path) -> None:
    """Have torch.compile keep what it makes in ``folder`` from one process to the next.

    Torch's own choice is the folder for temporary files, which a restart clears. Where
    ``TORCHINDUCTOR_CACHE_DIR`` is set, it stands. Each kind of CPU has a folder of its own: the key
    of an entry leaves out the width of its vectors, and code for AVX-512 that is found and built
    for AVX2 skips half of the elements (torch 2.13). One folder serves every config: entries are
    named by the content of the graph, so that configs which differ in the data or the schedule
    alone share theirs. First step of the former base.toml, two Zen 3 cores: 31 to 45 s with an
    empty folder, 5 s with its own entries, of which 1.5 s import the compiler and 2.5 s trace the
    model. To keep the trace as well (torch's precompilation) was slower, 10.5 s, and gives guards
    up.
    """
    bf16 = "-bf16" if native_bf16(torch.device("cpu")) else ""
    kind = torch.backends.cpu.get_cpu_capability() + bf16
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / kind))


def compile_cache_use() -> str | None:
    """Return whether what this process compiled came from the cache: warm, cold or partly warm.

    None: nothing was compiled.
    """
    hits, misses = compile_cache_counts() or (0, 0)
    if hits and misses:
        return "partly warm"
    return "warm" if hits else "cold" if misses else None
