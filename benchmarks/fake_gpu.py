"""Makes torch's CPU build compile for an H100, in this process: import it before torch.

Tensors are torch's fake ones: shapes without memory. The rest of a device is put in its place here:
a guard and hooks in C++ for autograd (fake_gpu.cpp), answers of ``torch.cuda`` and of Triton's
driver, and FlashAttention, which SDPA chooses on an H100 in half precision. Nothing can be run.
"""

import ctypes
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

NAME, CAPABILITY = "NVIDIA H100 80GB HBM3", (9, 0)


def _load_device() -> None:
    if shutil.which("g++") is None:
        sys.exit("compiling for a GPU without one needs g++; install it")
    assert "torch" not in sys.modules, "import benchmarks.fake_gpu before torch"
    folder = Path(importlib.util.find_spec("torch").origin).parent
    if (folder / "lib" / "libtorch_cuda.so").exists():
        sys.exit("compiling for a GPU without one needs torch's build for CPU, in which no CUDA is")
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(folder / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    with tempfile.TemporaryDirectory() as made:
        library, source = f"{made}/fake_gpu.so", Path(__file__).with_suffix(".cpp")
        options = ["-std=c++20", "-shared", "-fPIC", f"-I{folder / 'include'}"]
        subprocess.run(["g++", *options, str(source), "-o", library], check=True)
        ctypes.CDLL(library)


_load_device()

import torch  # noqa: E402
import torch._dynamo.device_interface  # noqa: E402
import torch._inductor.async_compile  # noqa: E402
import torch._inductor.config as inductor  # noqa: E402
import torch._inductor.fx_passes.joint_graph as joint_graph  # noqa: E402
import torch._inductor.runtime.triton_helpers as triton_helpers  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import triton  # noqa: E402
from fasttrain_kernels.aot import stub_driver  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._inductor.graph import GraphLowering as GraphLowering  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

DEVICE = torch.device("cuda", 0)


class Launched(Exception):
    """Compiled code has begun to run; there is nothing to run it on."""


class _Properties:
    name, major, minor, type, gcnArchName = NAME, *CAPABILITY, "cuda", ""
    multi_processor_count, warp_size, max_threads_per_block = 132, 32, 1024
    max_threads_per_multi_processor, regs_per_multiprocessor = 2048, 65536
    shared_memory_per_block, shared_memory_per_block_optin = 48 << 10, 227 << 10
    total_memory, L2_cache_size, is_integrated = 80 << 30, 50 << 20, False


class _Generator(torch.Generator):
    device = DEVICE

    def clone_state(self) -> torch.Generator:
        return self


class _OnCpu(TorchDispatchMode):
    """Makes new tensors on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    assert attn_mask is None
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    attention: Any = torch.ops.aten._scaled_dot_product_flash_attention
    return attention(q, k, v, dropout_p, is_causal, scale=scale)[0]


def _launch(*_: object, **__: object) -> None:
    raise Launched


def _answer(place: Any, **answers: Any) -> None:
    for name, value in answers.items():
        function = value if callable(value) else lambda *_, value=value, **__: value
        setattr(place, name, staticmethod(function) if isinstance(place, type) else function)


_known = {
    "is_available": True, "device_count": 1, "current_device": 0, "set_device": None,
    "synchronize": None, "is_bf16_supported": True, "get_device_properties": lambda *_: _Properties,
}  # fmt: skip
_answer(
    torch.cuda, **_known, get_device_capability=CAPABILITY, get_device_name=NAME, _lazy_init=None,
    is_initialized=True, set_rng_state=None, is_current_stream_capturing=False,
    get_rng_state=lambda *_: torch.zeros(16, dtype=torch.uint8),
)  # fmt: skip
torch.cuda.default_generators = (_Generator(),)
torch.cuda.device = torch.cuda._DeviceGuard = nullcontext  # type: ignore[assignment,misc]
_interface: Any = torch._dynamo.device_interface.CudaInterface
_answer(
    _interface, **_known, get_compute_capability=90, get_raw_stream=0, exchange_device=0,
    maybe_exchange_device=0,
)  # fmt: skip
_answer(_interface.Worker, get_device_properties=lambda *_: _Properties, current_device=0)
_answer(torch._C, _cuda_getCurrentRawStream=0)
# The first thing that compiled code does, forward and backward being compiled by then.
_answer(torch._C._dynamo.guards, _empty_strided_cuda=_launch)
torch._functorch.config.force_non_lazy_backward_lowering = True
_answer(torch._inductor.async_compile.AsyncCompile, triton=None)  # its sources are read instead
_answer(triton_helpers, set_driver_to_gpu=None)
_more = {"get_active_torch_device": DEVICE, "get_device_interface": torch.cuda}
triton.runtime.driver.set_active(stub_driver(GPUTarget("cuda", 90, 32), **_more))
F.scaled_dot_product_attention = _flash
FakeTensorMode.avoid_device_init = property(lambda _: True)
inductor.compile_threads = 1  # where the threads are processes they know nothing of this
# What a cache has is not written, and so not read.
inductor.fx_graph_cache = torch._functorch.config.enable_autograd_cache = False
inductor.use_static_triton_launcher = False  # whose kernels do not show their code
inductor.benchmark_kernel = True  # which writes the bytes of a kernel into its source

_folder = joint_graph.UniformValueConstantFolder
_fold = _folder._deduce_value


def _fold_on_cpu(self: Any, node: Any) -> Any:
    with _OnCpu():  # the value of a constant is computed, with memory
        return _fold(self, node)


_folder._deduce_value = _fold_on_cpu
