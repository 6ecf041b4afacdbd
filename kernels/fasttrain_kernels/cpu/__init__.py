"""Builds the C++ of operations on a CPU, and caches the result.

Products are those of libtorch_cpu; all else is plain loops, compiled for the vectors that torch
uses here. Torch uses g++'s OpenMP as well: both share one pool of threads.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._torch import has_bf16_instructions, may_use_amx

FLAGS = (
    *("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", "-std=c++17"),
    *(f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"),
)
# By what torch uses: it may be held to less than the CPU has (``ATEN_CPU_CAPABILITY``).
_VECTORS = {
    "AVX2": ("-march=x86-64-v3",),
    "AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
}
if platform.machine() in ("aarch64", "arm64"):
    _VECTORS[torch.backends.cpu.get_cpu_capability()] = ("-mcpu=native",)


@cache
def compiler() -> str | None:
    """Return g++, or else clang++, if it has OpenMP; None: neither has."""
    for name in filter(shutil.which, ("g++", "clang++")):
        check = [name, "-fopenmp", "-fsyntax-only", "-x", "c++", "-"]
        if not subprocess.run(check, input=b"#include <omp.h>", capture_output=True).returncode:
            return name
    return None


@cache
def is_supported() -> bool:
    """Return whether the CPU has AVX2, AVX-512 or is an ARM, with a compiler; never on Windows."""
    has_vectors = torch.backends.cpu.get_cpu_capability() in _VECTORS
    return hasattr(os, "getuid") and has_vectors and compiler() is not None


@cache
def computes_in(dtype: torch.dtype) -> bool:
    """Return whether products in ``dtype`` are made in C++ here, and not emulated."""
    native = dtype == torch.bfloat16 and has_bf16_instructions()
    return (native or dtype == torch.float32) and is_supported()


@cache
def load(*sources: str | Path, dtype: torch.dtype = torch.float32) -> ctypes.CDLL:
    """Return the library of files of this folder, compiled one behind the other, for one dtype.

    It is kept by content in the folder where torch.compile keeps its own
    (``TORCHINDUCTOR_CACHE_DIR``), else among temporary files; compiling takes 2 to 4 s. It is
    loaded only from a folder that nobody else can write, and only if it has the hash that it was
    written with; else it is compiled anew.

    Raises:
        RuntimeError: the compiler is missing or refuses the code; the message is its own. Or
            nothing can be written to the folder, or loaded from it.
    """
    text = "".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in sources)
    vectors = _VECTORS[torch.backends.cpu.get_cpu_capability()]
    if dtype == torch.bfloat16:
        vectors += ("-DBF16",)
        if has_bf16_instructions():
            vectors += ("-mavx512bf16", *(["-mamx-tile", "-mamx-bf16"] if may_use_amx() else []))
    command = (compiler() or "g++", *vectors)
    key = hashlib.sha256("\n".join((*command, *FLAGS, text)).encode()).hexdigest()[:32]

    def build(path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent) as made:
            source = Path(made) / "source.cpp"
            source.write_text(text, encoding="utf-8")
            whole = (*command, "-o", str(path), str(source), *FLAGS)
            subprocess.run(whole, check=True, capture_output=True, text=True)

    from ._cache import UnsafeFolderError, load_library, private_folder  # Windows has no such users

    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    # By number: a user in a container may have no name.
    folder = Path(chosen or Path(tempfile.gettempdir()) / f"fasttrain_{os.getuid()}") / "cpp"
    try:
        try:
            return load_library(private_folder(folder), key, build)
        except UnsafeFolderError as e:
            remedy = "set TORCHINDUCTOR_CACHE_DIR to a folder that only you can write"
            warnings.warn(f"{e}: {sources[-1]} is compiled anew; {remedy}", stacklevel=2)
        with tempfile.TemporaryDirectory() as of_this_process:
            return load_library(private_folder(Path(of_this_process)), key, build)
    except subprocess.CalledProcessError as e:
        raise RuntimeError(f"{' '.join(e.cmd)}: {e.stderr or e}") from e
    except OSError as e:
        raise RuntimeError(f"{folder}: {e}") from e


@cache
def load_or_warn(*sources: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return what `load` returns. If it fails, warn, and return None: torch computes instead."""
    try:
        return load(*sources, dtype=dtype)
    except RuntimeError as e:
        warnings.warn(f"steps are slower, {sources[-1]} was not built: {e}", stacklevel=2)
        return None


def pointers(tensors: Iterable[Tensor | None]) -> Any:
    """Return the addresses of tensors as an array of pointers."""
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    return (ctypes.c_void_p * len(addresses))(*addresses)
