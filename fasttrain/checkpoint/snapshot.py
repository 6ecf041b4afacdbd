"""The tensors of a checkpoint as they were at one moment, in host memory, laid out as a file."""

import contextlib
import json
import mmap
import sys
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fasttrain.checkpoint import files as disk

__all__ = ["Snapshot"]


class Snapshot:
    """One group of tensors in a reused host buffer, laid out as its safetensors file."""

    def __init__(self, stem: str, tensors: Mapping[str, Tensor], *, pinned: bool = True) -> None:
        self.signature = self.describe(tensors)
        # Wide dtypes first, as the safetensors library orders them: every view is then aligned.
        self.names = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
        entries: dict[str, Any] = {}
        end = 0
        for name in self.names:
            tensor, begin = tensors[name], end
            if tensor.dtype not in disk.DTYPE_NAMES:
                raise disk.CheckpointError(
                    f"checkpoint: {stem}.{name} has dtype {tensor.dtype}, which safetensors does "
                    "not hold; convert it before saving"
                )
            end += tensor.numel() * tensor.element_size()
            entries[name] = {
                "dtype": disk.DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % 64)
        header = len(text).to_bytes(8, "little") + text
        self.cuda = any(t.is_cuda for t in tensors.values())
        size = len(header) + end
        self.content = self._room(size, pinned=self.cuda and pinned)  # all of the file
        self.content[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        self.buffer = self.content[len(header) :]
        self.views = [
            self.buffer[slice(*entries[n]["data_offsets"])].view(t.dtype).view(t.shape)
            for n, t in ((n, tensors[n]) for n in self.names)
        ]

    def _room(self, size: int, *, pinned: bool) -> Tensor:
        """Return memory that begins with a page, pinned or not.

        Torch's allocator of pinned memory rounds up to a power of two, 17 GiB to 32: here the pages
        themselves are registered, for as long as this object lives.
        """
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        room = torch.frombuffer(pages, dtype=torch.uint8)
        if pinned:
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            if int(runtime.cudaHostRegister(room.data_ptr(), size, 0)) == 0:
                release = weakref.finalize(self, runtime.cudaHostUnregister, room.data_ptr())
                release.atexit = False  # the system does it, and CUDA may be gone
            else:  # copies then make the device wait, and the next launch reports the error again
                with contextlib.suppress(RuntimeError):
                    torch.ones(1, device="cuda")
        return room

    @staticmethod
    def describe(tensors: Mapping[str, Tensor]) -> object:
        return [(n, t.dtype, t.shape, t.is_cuda) for n, t in sorted(tensors.items())]

    def copy_from(self, tensors: Mapping[str, Tensor]) -> None:
        for name, view in zip(self.names, self.views, strict=True):
            view.copy_(tensors[name].detach(), non_blocking=self.cuda)

    def first_nonfinite(self) -> str | None:
        """Looks at bits, in two long calls a tensor: the GIL is left, and no thread is started.

        But for the sign, what is not finite has greater bits than the greatest finite number.
        """
        for name, view in zip(self.names, self.views, strict=True):
            if not view.is_floating_point() or not view.numel():
                continue
            raw, size = view.flatten().view(torch.uint8).numpy(), view.element_size()
            last = torch.tensor([torch.finfo(view.dtype).max], dtype=torch.float64).to(view.dtype)
            finite = int.from_bytes(last.view(torch.uint8).tolist(), sys.byteorder)
            positive, negative = int(raw.view(f"i{size}").max()), int(raw.view(f"u{size}").max())
            if positive > finite or negative > finite + (1 << 8 * size - 1):
                return name
        return None
