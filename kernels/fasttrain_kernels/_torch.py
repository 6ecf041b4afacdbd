"""What is known of torch's private names, each with what happens where a version lacks it.

No other file of this project reads one (tests/repo/test_structure.py). Operators whose names begin
with an underscore, such as ``torch._foreach_mul_``, are not meant: their schemas are kept
compatible.
"""

import inspect
import os
import sys
from contextlib import nullcontext
from datetime import timedelta
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.optim import Optimizer

try:
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
except ImportError:

    class TorchDispatchMode:  # type: ignore[no-redef]
        """Stands for the class of modes that see each operation dispatched."""

        def __init__(self) -> None:
            raise RuntimeError(f"TorchDispatchMode {_MISSING}")


_CPUINFO = Path("/proc/cpuinfo")  # of Linux
_MISSING = f"is not in torch {torch.__version__}; use the version named in constraints.txt"


def _private(path: str, default: Any) -> Any:
    """Return what ``path`` below torch names, or ``default`` where it is not there."""
    try:
        return attrgetter(path)(torch)
    except AttributeError:
        return default


def has_bf16_instructions() -> bool:
    """Return whether the CPU has AVX512_BF16 or AMX, and torch uses AVX-512."""
    known = ("cpu._is_avx512_bf16_supported", "cpu._is_amx_tile_supported")
    has_them = any(_private(name, lambda: False)() for name in known)
    return has_them and torch.backends.cpu.get_cpu_capability() == "AVX512"


def native_bf16(device: torch.device) -> bool:
    """Return whether ``device`` multiplies bf16 faster than fp32, and torch makes use of it.

    A CPU does with AMX, and with AVX512_BF16 unless it is Intel's, whose fp32 products are faster.
    Emulated bf16 is far slower than fp32. Unknown: False.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    amx = _private("cpu._is_amx_tile_supported", lambda: False)()
    return has_bf16_instructions() and (amx or not _is_intel())


@cache
def _is_intel() -> bool:
    try:
        return "GenuineIntel" in _CPUINFO.read_text()
    except OSError:
        return False


def may_use_amx() -> bool:
    """Ask for the tiles of AMX, and return whether this process has them. Unknown: False."""
    granted: bool = _private("cpu._init_amx", lambda: False)()
    return granted


def is_being_transformed(*, unknown: bool = True) -> bool:
    """Return whether torch.func or forward-mode differentiation is active, or ``unknown``."""
    by_functions: bool = _private("_C._are_functorch_transforms_active", lambda: unknown)()
    return by_functions or getattr(forward_ad, "_current_level", 0 if unknown else -1) >= 0


def is_batched(tensor: torch.Tensor) -> bool:
    """Return whether ``is_grads_batched`` has made a tensor of several. Unknown: False."""
    known = _private("_C._functorch.is_legacy_batchedtensor", lambda _: False)
    return bool(known(tensor))


def is_dispatch_observed() -> bool:
    """Return whether a mode sees each operation that is dispatched. Unknown: True."""
    count: int = _private("_C._len_torch_dispatch_stack", lambda: 1)()
    return count > 0


def is_step_observed(optimizer: Optimizer) -> bool:
    """Return whether hooks or the profiler want to see an optimizer's step. Unknown: True."""
    module = sys.modules[Optimizer.__module__]
    hooks = [
        *(getattr(module, f"_global_optimizer_{when}_hooks", True) for when in ("pre", "post")),
        *(getattr(optimizer, f"_optimizer_step_{when}_hooks", True) for when in ("pre", "post")),
    ]
    return any(hooks) or bool(_private("_C._autograd._profiler_enabled", lambda: True)())


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Return whether hooks see an optimizer's step, and with it the gradients. Unknown: False."""
    return any(getattr(optimizer, f"_optimizer_step_{when}_hooks", 0) for when in ("pre", "post"))


def held_by(dtensor: torch.Tensor) -> Any:
    """Return a DTensor's shard; ``to_local`` passes the dispatcher for it. Unknown: None."""
    return getattr(dtensor, "_local_tensor", None)


def prefer_attention(backends: list[int]) -> None:
    """Have SDPA try its kernels on CUDA in this order, process-wide. Unknown: in torch's own."""
    _private("_C._set_sdp_priority_order", lambda _: None)(backends)


def unobserved() -> Any:
    """Return a context in which no mode sees or replaces operations. Unknown: without effect."""
    from torch.utils import _python_dispatch

    return getattr(_python_dispatch, "_disable_current_modes", nullcontext)()


def fake_tensors() -> Any:
    """Return a context in which tensors have shapes and no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def is_fake(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is one of `fake_tensors`: a shape on a device. Unknown: False."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    kind = getattr(module, "FakeTensor", None)
    return kind is not None and isinstance(tensor, kind)


def fake_store() -> Any:
    """Return a store for a process group named ``fake``, whose other ranks are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


def fsdp_collectives() -> tuple[Any, Any] | None:
    """Return FSDP2's own all-gather and reduce-scatter, to be wrapped. Unknown: None."""
    try:
        from torch.distributed.fsdp._fully_shard import _fsdp_collectives as known

        return known.DefaultAllGather(), known.DefaultReduceScatter()
    except (ImportError, AttributeError):
        return None


def drop_unreduced_gradients(model: Any) -> None:
    """Drop gradients that FSDP2 has not reduced yet, of backward passes that only accumulate.

    They lie beside the parameters that ``model.parameters()`` returns. Unknown: they stay.
    """
    for module in model.modules():
        state = getattr(module, "_get_fsdp_state", lambda: None)()
        group = getattr(state, "_fsdp_param_group", None)
        for param in getattr(group, "fsdp_params", ()):
            param.unsharded_accumulated_grad = None
            if (unsharded := getattr(param, "_unsharded_param", None)) is not None:
                unsharded.grad = None


def set_group_timeout(patience: timedelta, group: Any = None) -> None:
    """Have collectives of a group (None: of all ranks) fail after ``patience``. Unknown: as set."""
    _private("distributed.distributed_c10d._set_pg_timeout", lambda *_: None)(patience, group)


def record_memory_history(**options: Any) -> None:
    """Record CUDA allocations as ``options`` say, or stop. Unknown: nothing is recorded."""
    _private("cuda.memory._record_memory_history", lambda **_: None)(**options)


def dump_memory_history(path: str) -> None:
    """Write what was recorded to a file that pytorch.org/memory_viz reads. Unknown: none."""
    _private("cuda.memory._dump_snapshot", lambda _: None)(path)


def spare_compiler() -> None:
    """Keep optimizers from importing the compiler in a run that compiles nothing: 1.6 s.

    An optimizer's methods from torch are excluded from compiled code: each imports the compiler
    when it is first called and keeps the result in an attribute. Here that attribute is filled
    beforehand. On a torch that names it otherwise this has no effect.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method: Any = inspect.unwrap(getattr(torch.optim.Optimizer, name))
        if "torch._dynamo" not in sys.modules:
            method.__dynamo_disable = method


def compile_deterministically() -> None:
    """Keep Inductor from choosing between kernels that round differently by their speed.

    It reads the variable when it is imported, which takes a second. Unknown: no effect.
    """
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    if (config := sys.modules.get("torch._inductor.config")) is not None:
        config.deterministic = True  # type: ignore[attr-defined]


def compile_cache_counts() -> tuple[int, int] | None:
    """Return how many graphs Inductor found in its cache, and how many it compiled.

    None: nothing was compiled, or it is not known.
    """
    utils = sys.modules.get("torch._dynamo.utils")
    count = getattr(utils, "counters", {}).get("inductor")
    if not count:
        return None
    misses = count["fxgraph_cache_miss"] + count["fxgraph_cache_bypass"]
    return count["fxgraph_cache_hit"], misses
