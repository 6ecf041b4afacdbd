"""Builds the simulated device once for a torch and runs pytest on it, in a child process."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.support.toy import ENV, ROOT

__all__ = ["missing", "run_tests"]

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
PLUGIN = "tests.support.simulated_cuda.shim"


def missing() -> str:
    """Return why there is no simulated device here, or nothing."""
    if sys.platform != "linux" or COMPILER is None:
        return "the simulated CUDA device is built by g++ on Linux"
    if torch.version.cuda or torch.version.hip:
        return "the simulated CUDA device stands in for one that this torch has itself"
    return ""


def library() -> Path:
    """Return the device's library; it is built where there is none for this source and torch."""
    assert COMPILER is not None
    source, package = HERE / "device.cpp", Path(torch.__file__).parent
    found = hashlib.sha256(source.read_bytes() + f"{torch.__version__} {package}".encode())
    folder = Path(tempfile.gettempdir()) / f"fasttrain-tests-{os.getuid()}"
    built = folder / f"simulated_cuda_{found.hexdigest()[:16]}.so"
    if not built.exists():
        folder.mkdir(exist_ok=True)
        part = built.with_suffix(f".{os.getpid()}")
        command = [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{package}/include"]
        command += [str(source), f"-L{package}/lib", "-ltorch_cpu", "-lc10", "-o", str(part)]
        subprocess.run(command, check=True)
        part.replace(built)  # whole, whoever else builds it
    return built


def run_tests(*arguments: str) -> tuple[int, str]:
    """Run pytest with the device preloaded; return its status and what it printed."""
    command = [sys.executable, "-m", "pytest", "-p", PLUGIN, "-p", "no:xdist"]
    command += ["-o", "addopts=--import-mode=importlib --strict-markers", "-p", "no:cacheprovider"]
    command += ["-W", "ignore:flex_attention called without torch.compile"]
    done = subprocess.run(
        [*command, "-q", "--durations=8", *arguments],
        cwd=ROOT,
        env=ENV
        | {
            "LD_PRELOAD": str(library()),
            "LD_LIBRARY_PATH": str(Path(torch.__file__).parent / "lib"),
            "SIMULATED_CUDA_DEVICES": "2",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout
