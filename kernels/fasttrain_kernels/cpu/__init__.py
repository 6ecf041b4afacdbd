"""Builds the C++ of operations on a CPU, and caches the result.

It is written for AVX2 and g++, whose OpenMP torch uses as well: both share one pool of threads.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

# Matrix products, which other sources are compiled behind.
PRODUCT = Path(__file__).parent / "product.h"

_FLAGS = ("-O3", "-mavx2", "-mfma", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC", "-std=c++17")


@cache
def is_supported() -> bool:
    """Return whether this machine has AVX2, no wider vectors, and g++, and is not Windows.

    With wider vectors this C++ has not been measured against torch's own operations.
    """
    return (
        hasattr(os, "getuid")
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
        and shutil.which("g++") is not None
    )


@cache
def load(*sources: Path) -> ctypes.CDLL:
    """Return the library of C++ files, compiled one behind the other as one.

    It is kept by content in the folder where torch.compile keeps its own
    (``TORCHINDUCTOR_CACHE_DIR``), else among temporary files; compiling takes 2 to 4 s.

    Raises:
        RuntimeError: g++ is missing or refuses the code; the message is its own. Or nothing can be
            written to the folder, or loaded from it.
    """
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    key = hashlib.sha256("\n".join((*_FLAGS, text)).encode()).hexdigest()[:32]
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    # By number: a user in a container may have no name.
    folder = Path(chosen or Path(tempfile.gettempdir()) / f"fasttrain_{os.getuid()}") / "cpp"
    path = folder / f"{key}.so"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as made:
                source, built = Path(made) / "source.cpp", Path(made) / "built.so"
                source.write_text(text, encoding="utf-8")
                command = ["g++", *_FLAGS, "-o", str(built), str(source)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                built.replace(path)
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as e:
        raise RuntimeError(f"{' '.join(e.cmd)}: {e.stderr or e}") from e
    except OSError as e:
        raise RuntimeError(f"{path}: {e}") from e


def load_or_warn(name: str, *sources: Path) -> ctypes.CDLL | None:
    """Return what `load` does, or None where it cannot be built: torch's operations do without."""
    try:
        return load(*sources)
    except RuntimeError as e:
        warnings.warn(f"{name} is slower, its C++ was not built: {e}", stacklevel=2)
        return None
