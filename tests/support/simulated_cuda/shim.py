"""The part of `torch.cuda` that a CPU build lacks, over the preloaded device of device.cpp.

Importing this module in a process that `start` has started is what makes the device available;
pytest does so by ``-p tests.support.simulated_cuda.shim``. Triton's interpreter runs the kernels.
"""

import contextlib
import ctypes
import importlib
import os
import threading
import traceback
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
import torch

device = ctypes.CDLL(os.environ.pop("LD_PRELOAD"))
device.sim_used.restype = device.sim_peak_pinned.restype = ctypes.c_size_t
device.sim_used.argtypes = [ctypes.c_int, ctypes.c_int]
device.sim_limit.argtypes = [ctypes.c_int, ctypes.c_size_t]
device.sim_pin.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
device.sim_unpin.argtypes = [ctypes.c_size_t]
device.sim_ready.restype = device.sim_touched.restype = ctypes.c_bool

N_DEVICES = int(os.environ.get("SIMULATED_CUDA_DEVICES", "1"))
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
    warp_size=32,
)


class Event(torch.Event):
    """`torch.cuda.Event`; torch compares types exactly, so that there are no instances of this."""

    def __new__(cls, enable_timing: bool = False, **_: Any) -> torch.Event:  # type: ignore[misc]
        return torch.Event("cuda", enable_timing=enable_timing)


class Stream(torch.Stream):
    """`torch.cuda.Stream`, likewise."""

    def __new__(cls, device: Any = None, **_: Any) -> torch.Stream:  # type: ignore[misc]
        return torch.Stream(torch.device("cuda", index_of(device)))


def index_of(device: Any = None) -> int:
    """Return the index of a device; None is the current one."""
    if device is None or isinstance(device, int):
        return exchange(-1) if device is None else device
    index = torch.device(device).index
    return exchange(-1) if index is None else index


def exchange(index: int) -> int:
    """Make a device current and return the one that was; a negative index changes nothing."""
    return int(device.sim_exchange(index))


def cudart() -> SimpleNamespace:
    """Return what registers pinned memory."""

    def register(pointer: int, size: int, flags: int) -> int:
        device.sim_pin(pointer, size)
        return 0

    def unregister(pointer: int) -> int:
        device.sim_unpin(pointer)
        return 0

    return SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)


def install() -> None:
    """Put all this in the place of what raises for want of CUDA."""
    cuda: Any = torch.cuda
    accelerator: Any = torch.accelerator
    capability = (PROPERTIES.major, PROPERTIES.minor)
    for name, value in {
        "Event": Event,
        "Stream": Stream,
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: capturing_now,
        "current_device": index_of,
        "device_count": lambda: N_DEVICES,
        "set_device": lambda d: exchange(index_of(d)),
        "synchronize": lambda d=None: accelerator.synchronize(index_of(d)),
        "current_stream": lambda d=None: accelerator.current_stream(index_of(d)),
        "default_stream": lambda d=None: torch.Stream(0, index_of(d), 1),
        "set_stream": accelerator.set_stream,
        "get_device_capability": lambda d=None: capability,
        "get_device_properties": lambda d=None: PROPERTIES,
        "get_device_name": lambda d=None: PROPERTIES.name,
        "mem_get_info": lambda d=None: (limit_of(d) - used(d), limit_of(d)),
        "memory_allocated": lambda d=None: used(d),
        "max_memory_allocated": lambda d=None: used(d, 1),
        "reset_peak_memory_stats": lambda d=None: used(d, 2),
        "empty_cache": lambda: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "cudart": cudart,
    }.items():
        setattr(cuda, name, value)
    # Inductor's code is for a real device; FlexAttention, which is always compiled, runs as it is.
    torch.compile = lambda function, **_: function
    torch.UntypedStorage.clone = lambda self: (  # type: ignore[method-assign]
        torch.empty(0, dtype=torch.uint8, device=self.device).set_(self).clone().untyped_storage()
    )


def used(at: Any = None, what: int = 0) -> int:
    """Return the bytes allocated on a device; 1: at most, 2: begin to count that anew."""
    return int(device.sim_used(index_of(at), what))


def limit_of(at: Any = None) -> int:
    """Return the memory of a device."""
    return int(device.sim_used(index_of(at), 3))


@contextlib.contextmanager
def memory_limit(size: int, at: int = 0) -> Iterator[None]:
    """Leave this much memory to a device, in bytes."""
    before = limit_of(at)
    device.sim_limit(at, size)
    try:
        yield
    finally:
        device.sim_limit(at, before)


# ---- what the host waits for ---------------------------------------------------------------------

_Told = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


@contextlib.contextmanager
def waits() -> Iterator[list[str]]:
    """Give a list of all by which the host waits for the device, each with where it was done."""
    found: list[str] = []

    def told(what: bytes) -> None:
        frames = [f for f in traceback.extract_stack() if "simulated_cuda/shim" not in f.filename]
        here = " < ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in frames[:-6:-1])
        found.append(f"{what.decode()} at {here}")

    callback = _Told(told)
    device.sim_on_wait(callback)
    try:
        yield found
    finally:
        device.sim_on_wait(None)


# ---- streams that are behind ---------------------------------------------------------------------

_Work = ctypes.CFUNCTYPE(ctypes.c_bool)
_pending: dict[int, Any] = {}  # kept until they have run
capturing_now = False


def launch(work: Any) -> None:
    """Run something in the current stream, after what is pending there."""
    if device.sim_ready():
        work()
        return

    def late() -> bool:
        with torch.no_grad():
            work()
        _pending.pop(number)
        return True

    number = max(_pending, default=0) + 1
    _pending[number] = _Work(late)
    device.sim_push(_pending[number])


@contextlib.contextmanager
def planted(fault: int) -> Iterator[None]:
    """Have streams (1), or the host (2), not wait for events."""
    device.sim_fault(fault)
    try:
        yield
    finally:
        device.sim_fault(0)


@contextlib.contextmanager
def deferred_copies() -> Iterator[None]:
    """Let asynchronous copies, and what follows them on side streams, happen when waited for."""
    device.sim_defer(True)
    try:
        yield
    finally:
        torch.cuda.synchronize()
        device.sim_defer(False)


class Stall:
    """Work on the current stream that does not end before `release`, as a collective may."""

    def __init__(self) -> None:
        self.over = False
        self._work = _Work(lambda: self.over)
        device.sim_push(self._work)

    def release(self) -> None:
        self.over = True


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Refuse what a stream that is captured into a CUDA graph does not permit."""
    global capturing_now
    capturing_now = True
    device.sim_capturing(True)
    try:
        yield
    finally:
        capturing_now = False
        device.sim_capturing(False)


def interpret() -> None:
    """Have the interpreter launch on the device; its arguments lie where the host can read them."""
    importlib.import_module("triton.experimental.gluon")
    from triton.runtime import interpreter

    executor: Any = interpreter.GridExecutor
    call, patch = executor.__call__, interpreter._patch_lang
    state = threading.local()

    def on_stream(self: Any, *args: Any, **kwargs: Any) -> None:
        def work() -> None:
            state.scopes = {}
            call(self, *args, **kwargs)

        launch(work)

    def patch_once(fn: Any) -> Any:  # a launch and module, not each function called: 0.4 ms
        if fn.__module__ not in state.scopes:
            state.scopes[fn.__module__] = patch(fn)
        return state.scopes[fn.__module__]

    executor._init_args_hst = lambda self, args, kwargs: (list(args), dict(kwargs))
    executor._restore_args_dev = lambda self, *_: None
    executor.__call__ = on_stream
    interpreter._patch_lang = patch_once


install()
import fasttrain_kernels  # noqa: E402, F401
from dev.aot.traffic import mend_interpreter  # noqa: E402

interpret()
mend_interpreter()
del os.environ["TRITON_INTERPRET"]
