"""Where and in which precision a run computes."""

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fasttrain_kernels._torch import compile_deterministically, native_bf16, prefer_attention

from fasttrain.config.keys import refuse


def resolve_device(name: str) -> torch.device:
    """Return the device that ``run.device`` names; ``auto`` is CUDA if there is one, else CPU."""
    n_cuda = torch.cuda.device_count()
    device = torch.device(("cuda" if n_cuda else "cpu") if name == "auto" else name)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)  # torch.cuda.set_device needs an index
        if device.index >= n_cuda:
            found = f"names no CUDA device of this machine ({n_cuda or 'none'} found)"
            refuse("run.device", name, f"{found}; use run.device=cpu or auto")
    return device


def make_deterministic() -> None:
    """Have every operation of this process give the same bits each time; before CUDA starts.

    One that cannot raises torch's error. SDPA then leaves cuDNN's kernel out, and the backward of
    FlashAttention and of the memory-efficient kernel adds in a fixed order, as FlexAttention's
    always does. What is compiled takes no reduction by how fast it was.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    fill: Any = torch.utils.deterministic  # unknown to torch's stubs
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

    ``auto`` is bf16 where it is faster than fp32; else fp16 on CUDA and fp32 on a CPU.
    """
    if name == "auto":
        fallback = "fp16" if device.type == "cuda" else "fp32"
        name = "bf16" if native_bf16(device) else fallback
    if name == "tf32" and device.type != "cuda":
        refuse("run.dtype", name, f"needs a CUDA device, got {device}; use fp32 or auto")
    dtypes = {
        "fp32": torch.float32,
        "tf32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
    }
    if name not in dtypes:
        refuse("run.dtype", name, "is not implemented; add it to resolve_precision")
    return Precision(name, dtypes[name], device.type)


def set_matmul_precision(precision: Precision) -> None:
    """Have fp32 matrix products of this process use TF32 on CUDA, unless the precision is fp32."""
    if precision.device_type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision.name == "fp32" else "high")


ATTENTION = {"flash": "FlashAttention", "cudnn": "cuDNN attention", "fa3": "FlashAttention-3"}


def resolve_attention(name: str, device: torch.device, *, deterministic: bool) -> str | None:
    """Return which of SDPA's kernels ``run.attention`` names on CUDA, a key of `ATTENTION`.

    ``auto`` is cuDNN on an H100 or a B200, unless the run is deterministic, and FlashAttention
    elsewhere: in training shapes others measured cuDNN at 1.7 to 2.3 times the speed of
    FlashAttention-2 on an H100, and 0.8 to 1.0 times on an A100, an A10G and an L40S
    (github.com/huggingface/transformers/pull/48163 of 2026). ``preflight --kernels`` measures both.
    """
    if device.type != "cuda":
        if name != "auto":
            refuse("run.attention", name, f"needs a CUDA device, got {device}; use auto")
        return None
    if name == "auto":
        suits = torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))
        name = "cudnn" if suits and not deterministic else "flash"
    return name


def prefer_attention_kernel(name: str) -> None:
    """Have SDPA try a kernel of `ATTENTION` first in this process; others do what it cannot."""
    from torch.nn.attention import SDPBackend, activate_flash_attention_impl

    if name == "fa3":
        try:
            activate_flash_attention_impl("FA3")
        except (ImportError, RuntimeError, ValueError) as error:
            remedy = "install flash_attn_interface, which is built from the folder hopper of "
            remedy += "github.com/Dao-AILab/flash-attention, or use auto"
            refuse("run.attention", name, f"cannot be used ({error}); {remedy}")
    order = ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]  # torch's, and cuDNN
    order.insert(0 if name == "cudnn" else 3, "CUDNN_ATTENTION")
    prefer_attention([SDPBackend.__members__[backend].value for backend in order])


def set_threads(n: int | None, n_cores: int) -> None:
    """Have torch compute in ``n`` threads; None: in at most one for each core that may be used.

    Torch itself looks at the affinity alone. ``OMP_NUM_THREADS`` stands where it is set.
    """
    if n is None and "OMP_NUM_THREADS" not in os.environ:
        n = min(torch.get_num_threads(), n_cores)
    if n not in (None, torch.get_num_threads()):
        torch.set_num_threads(n)


def keep_freed_memory() -> None:
    """Make glibc's malloc keep large freed blocks instead of returning them to the system.

    By default each activation above 32 MiB at the most is mapped anew, and the kernel clears its
    pages at every step (benchmarks/EXPERIMENTS.md). No effect if the C library
    has no ``mallopt``.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


def core_seconds() -> tuple[float, float]:
    """Return how long the threads of this process have run, and have waited for a core, in s.

    Of those that live; zeros on a system without Linux's ``schedstat``.
    """
    found = [0, 0]
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread ended meanwhile
            found = [a + int(b) for a, b in zip(found, path.read_text().split(), strict=False)]
    return found[0] / 1e9, found[1] / 1e9


class CoreWatch:
    """Has threads of OpenMP sleep as soon as they wait, while other processes use their cores.

    A thread that spins keeps the one that it waits for from its core. GCC's OpenMP spins a hundred
    times at most while it has more threads than there are cores (its manual, ``GOMP_SPINCOUNT``):
    here the team of a thread that does nothing else. Results do not depend on it. Threads that
    sleep are faster beside busy processes, and slower alone (benchmarks/EXPERIMENTS.md).
    """

    EVERY_S = 1.0

    def __init__(self) -> None:
        self._then_s, self._core_s = time.monotonic(), core_seconds()
        self._ends: threading.Event | None = None  # the idle team, from the first one on

    def look(self) -> float | None:
        """Return the share of their time that threads wait for a core, as they first sleep for it.

        None: they do not, or did before, or the last look was less than ``EVERY_S`` ago.
        """
        if (now_s := time.monotonic()) < self._then_s + self.EVERY_S:
            return None
        before, self._then_s, self._core_s = self._core_s, now_s, core_seconds()
        ran, waited = (now - then for now, then in zip(self._core_s, before, strict=True))
        share = waited / max(ran + waited, 1e-9)
        spin = self._ends is None or self._ends.is_set()
        if spin and share > 0.2 and torch.get_num_threads() > 1:
            first, self._ends = self._ends is None, threading.Event()
            threading.Thread(target=_idle, args=[self._ends.wait], daemon=True).start()
            return share if first else None
        if share < 0.1:
            self.close()
        return None

    def close(self) -> None:
        """Let threads spin again."""
        if self._ends is not None:
            self._ends.set()


def _idle(wait: Callable[[], Any]) -> None:
    # A team of threads computes this, and this thread keeps the team.
    torch.empty(2**20, dtype=torch.float32, device="cpu").fill_(0.0)
    wait()
