"""Which slice of a whole tensor lies on this rank, found without asking the other ranks."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Slice:
    """``begin`` to ``end`` of dimension ``dim``, all of the others, of a tensor of ``shape``."""

    shape: tuple[int, ...]
    dim: int
    begin: int
    end: int

    @classmethod
    def all_of(cls, tensor: Tensor) -> "Slice":
        """Return the slice that is the whole; a scalar has no dimension to cut."""
        return cls(tuple(tensor.shape), 0, 0, tensor.shape[0] if tensor.ndim else 1)

    @property
    def local_shape(self) -> tuple[int, ...]:
        length = self.end - self.begin
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])

    def of(self, whole: Tensor) -> Tensor:
        """Return this slice of a whole tensor, a view."""
        return whole.narrow(self.dim, self.begin, self.end - self.begin) if self.shape else whole


def locate(tensor: Tensor) -> tuple[Slice, bool] | None:
    """Return where the local tensor of a DTensor lies in the whole; None for any other tensor.

    Also whether this rank is the first that holds it. Raises TypeError unless the tensor is
    replicated or sharded by one dimension, as FSDP2 does it, on a mesh of any shape.
    """
    if type(tensor) is Tensor or not hasattr(tensor, "placements"):
        return None
    spread_over: Any = tensor
    mesh, placements = spread_over.device_mesh, spread_over.placements
    coordinates = mesh.get_coordinate()
    shape, found, first = tuple(tensor.shape), None, True
    for size, at, placement in zip(mesh.shape, coordinates, placements, strict=True):
        if placement.is_replicate():
            first = first and at == 0
        elif type(placement).__name__ == "Shard" and found is None:
            length = shape[placement.dim]
            step = -(-length // size)  # torch.chunk: the last ones are shorter, or empty
            begin = min(at * step, length)
            found = Slice(shape, placement.dim % len(shape), begin, min(begin + step, length))
        else:
            raise TypeError(
                f"checkpoint: a DTensor must be replicated or sharded by one dimension, got "
                f"{tuple(placements)}; redistribute it before saving"
            )
    return found or Slice.all_of(tensor), first


def cut(whole: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor sharded as ``like`` is, this rank's slice copied; no rank waits.

    It is returned as it is if ``like`` is not a DTensor of its shape.
    """
    located = locate(like) if whole.shape == like.shape else None
    if located is None:
        return whole
    from torch.distributed.tensor import DTensor

    local = located[0].of(whole).to(like.device, copy=True).contiguous()
    spread: Any = like
    where: Any = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    result: Tensor = DTensor.from_local(local, spread.device_mesh, spread.placements, **where)
    return result
