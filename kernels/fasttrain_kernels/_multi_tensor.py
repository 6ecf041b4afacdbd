"""One launch over many tensors: device tables of pointers, lengths and chunks.

A tensor is cut into chunks of CHUNK elements. Chunk number k of the launch is described by
``chunks[k] = (tensor, index within the tensor)``; ``pointers[column, tensor]`` holds addresses, one
column for each operand (parameter, gradient, …). Sizes change rarely and addresses seldom, so the
tables stay on the device; only what changed is uploaded, from pinned memory, without waiting.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._launch import TRITON_DTYPES, n_multiprocessors, warp_size
from ._triton import tl, triton

# 2**13 elements: at 1e8 parameters each of some 500 resident programs gets about 25 chunks, so the
# last round costs at most 4 %; 28 B an element make the 8 B table entry vanish.
CHUNK = 8192
BLOCK = 2048
REGISTERS = 64  # of a thread, until a kernel's are known: 4 programs a multiprocessor
# The interpreter runs programs one after the other; a few suffice to exercise the loop.
_CPU_PROGRAMS = 4
_CACHED_TABLES = 8


def triton_dtype(dtype: torch.dtype) -> Any:
    """Return Triton's name of a storage dtype.

    Raises:
        TypeError: the kernels do not support it.
    """
    if dtype not in TRITON_DTYPES:
        raise TypeError(
            f"fasttrain_kernels: optimizer kernels support float32, bfloat16 and float16, got "
            f"{dtype}; keep float64 tensors on the CPU"
        )
    return TRITON_DTYPES[dtype]


# What a CUDA graph reads must outlive it, and its end cannot be observed: a few hundred KiB each.
_kept_for_graphs: list[Any] = []


def capturing(device: torch.device) -> bool:
    """Return whether launches are being recorded into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def keep_for_graph(*owners: Any) -> None:
    """Keep memory alive that a graph being captured will read when it is replayed."""
    _kept_for_graphs.extend(owners)


def launch_grid(n_chunks: int, device: torch.device, registers: int = REGISTERS) -> int:
    """Return how many programs share the chunks: as many as the device holds at a time.

    More would wait for a second round, in which most multiprocessors are idle.
    """
    n_programs = _CPU_PROGRAMS
    if device.type == "cuda":
        of_threads = torch.cuda.get_device_properties(device).max_threads_per_multi_processor // 256
        of_registers = 65536 // (-(-registers // 8) * 8 * 256)
        n_programs = max(1, min(of_threads, of_registers)) * n_multiprocessors(device)
    return max(1, min(n_chunks, n_programs))


def block_warps(tensor: Tensor) -> int:
    """Return the warps with which a thread has 8 elements of a block: 16 bytes of 2-byte dtypes."""
    return BLOCK // (8 * warp_size(tensor))


class DeviceNumbers:
    """Numbers on the device, uploaded without waiting when others are asked for."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        self._pinned = device.type == "cuda"
        self._uploaded: list[Any] | None = None
        self._spare: Tensor | None = None  # for the next capture

    def on_device(self, numbers: list[Any]) -> Tensor:
        """Return the numbers, in order of memory, in a tensor that launches on this stream read.

        Raises:
            RuntimeError: two graphs are captured without a step between them.
        """
        if capturing(self.tensor.device):
            # A graph replays the copy from this very memory to this very memory: both are its own,
            # so that neither it nor an ordinary step finds the other's numbers.
            host, self._spare = self._spare, None
            if host is None and self._pinned:
                raise RuntimeError(
                    "fasttrain_kernels: pinned memory cannot be allocated while a CUDA graph is "
                    "being captured; make an ordinary step before each capture"
                )
            host = self._new_host() if host is None else host
            host.copy_(torch.tensor(numbers, dtype=host.dtype, device="cpu"))
            copy = torch.empty_like(self.tensor)
            copy.view(-1).copy_(host, non_blocking=True)
            keep_for_graph(host, copy)
            return copy
        if self._spare is None and self._pinned:
            self._spare = self._new_host()
        if numbers != self._uploaded:
            host = torch.tensor(
                numbers, dtype=self.tensor.dtype, device="cpu", pin_memory=self._pinned
            )
            self.tensor.view(-1).copy_(host, non_blocking=True)
            self._uploaded = numbers
        return self.tensor

    def _new_host(self) -> Tensor:
        return torch.empty(
            self.tensor.numel(), dtype=self.tensor.dtype, device="cpu", pin_memory=self._pinned
        )


class TensorTable:
    """The tables of one launch over tensors of given sizes."""

    def __init__(self, numels: Sequence[int], n_columns: int, device: torch.device) -> None:
        self.n_tensors = len(numels)
        self.device = device
        options: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}
        counts = torch.tensor([-(-n // CHUNK) for n in numels], **options)
        tensor = torch.repeat_interleave(torch.arange(self.n_tensors, **options), counts)
        first = torch.cumsum(counts, 0) - counts
        index = torch.arange(tensor.numel(), **options) - first[tensor]
        self.n_chunks = tensor.numel()
        self.chunks = torch.stack([tensor, index], 1).to(device, torch.int32)  # (n_chunks, 2)
        self.lengths = torch.tensor(numels, **options).to(device)
        self._pointers = DeviceNumbers((n_columns, self.n_tensors), torch.int64, device)
        self._registers: dict[int, int | None] = {}  # of each kernel; the interpreter's have none

    def on_device(self, pointers: list[int]) -> Tensor:
        """Return the addresses, column by column, (n_columns, n_tensors) on the device."""
        if capturing(self.device):
            keep_for_graph(self)
        return self._pointers.on_device(pointers)

    def launch(self, kernel: Any, *arguments: Any, **options: Any) -> None:
        """Launch a kernel over the chunks, in as many programs as the device holds at a time."""
        used = self._registers.get(id(kernel)) or REGISTERS
        options |= {"CHUNK": CHUNK, "BLOCK": BLOCK, "num_warps": block_warps(self.chunks)}
        with torch.cuda.device_of(self.chunks):
            compiled = kernel[(launch_grid(self.n_chunks, self.device, used),)](
                *arguments, **options
            )
        self._registers[id(kernel)] = getattr(compiled, "n_regs", None)


_tables: OrderedDict[tuple[Any, ...], TensorTable] = OrderedDict()


def cached_table(tensors: Sequence[Tensor]) -> tuple[TensorTable, Tensor]:
    """Return a one-column table, from the few used last, and the tensors' addresses in it."""
    numels = tuple(t.numel() for t in tensors)
    device = tensors[0].device
    pointers = [t.data_ptr() for t in tensors]
    # Launches prepared in parallel, or on two streams, have separate tables: the addresses of one
    # must not replace the other's. A graph cannot make a table; its addresses are its own in any.
    kind = (device, tensors[0].dtype, pointers[0] % 16 == 0, numels)
    stream = torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0
    key = (*kind, stream)
    if capturing(device):
        key = next((other for other in _tables if other[:-1] == kind), key)
    table = _tables.get(key)
    if table is None:
        table = _tables[key] = TensorTable(numels, 1, device)
        while len(_tables) > _CACHED_TABLES:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return table, table.on_device(pointers)


@triton.jit
def load_pointer(pointers_ptr, tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Load an address as a pointer to DTYPE, with a promise that it is a multiple of 16."""
    pointer = tl.load(pointers_ptr + tensor).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer
