"""Muon for matrices whose rows are spread over ranks: each matrix is orthogonalised by one of them.

Momentum stays where the shards are. The directions of equal shape are dealt out to the ranks in
turn: one all-to-all brings every matrix together at its owner, a second one carries the rows of the
orthogonalised matrix back. A rank sends and receives 2 · (its shards) numbers a step, in the dtype
of the iteration's products, and does its share of the products; gathering everything everywhere
would take as many times more of both as there are ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .newton_schulz import newton_schulz, products_dtype

__all__ = ["ShardedBatch", "shard_group"]


def shard_group(param: Any) -> dist.ProcessGroup | None:
    """Return the ranks over which the rows of a DTensor are spread, None where they are whole.

    Raises:
        TypeError: it is laid out in another way.
    """
    from torch.distributed.tensor import Shard  # 0.5 s that only a program with DTensors has paid

    sharded = [d for d, p in enumerate(param.placements) if not p.is_replicate()]
    if not sharded:
        return None
    placement = param.placements[sharded[0]]
    if len(sharded) > 1 or type(placement) is not Shard or placement.dim != 0:
        raise TypeError(
            "Muon: a DTensor must be replicated, or sharded by rows (Shard(0)) over one dimension "
            f"of its mesh, got {param.placements}; redistribute it or give it to FusedAdamW"
        )
    group: dist.ProcessGroup = param.device_mesh.get_group(sharded[0])
    return group


class ShardedBatch:
    """Matrices of one group, shape and layout, of which this rank holds some rows each.

    Args:
        group: hyper-parameters.
        scale: of the update.
        shape: of the whole matrices.
        ranks: over which their rows are spread; None: whole.
        first_owner: which rank orthogonalises the first matrix, modulo their number.
    """

    def __init__(
        self,
        group: dict[str, Any],
        scale: float,
        shape: tuple[int, int],
        ranks: dist.ProcessGroup | None,
        first_owner: int,
    ) -> None:
        self.group = group
        self.scale = scale
        self.shape = shape
        self.ranks = ranks
        self.first_owner = first_owner
        self.indices: list[int] = []
        self.momenta: list[Tensor] = []  # the local rows, (local r, c) each
        world = 1 if ranks is None else dist.get_world_size(ranks)
        chunk = -(-shape[0] // world)
        self.rank = 0 if ranks is None else dist.get_rank(ranks)
        # Rows bounds[k] to bounds[k + 1] of every matrix are with rank k: Shard cuts like chunk().
        self.bounds = [min(k * chunk, shape[0]) for k in range(world + 1)]

    def _exchange(self, pieces: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """Send piece k to rank k; return what the ranks sent here, ``sizes`` numbers each."""
        flat = [piece.reshape(-1) for piece in pieces]
        if self.ranks is None:
            return flat
        received = flat[0].new_empty(sum(sizes))
        counts = [piece.numel() for piece in flat]
        dist.all_to_all_single(received, torch.cat(flat), sizes, counts, group=self.ranks)
        return list(torch.split(received, sizes))

    def orthogonalise(self, directions: list[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
        """Return this rank's rows of newton_schulz of the whole matrices.

        Args:
            directions: (local r, c) each.
            dtype: of the products; None: as `newton_schulz` chooses.
        """
        world, cols, steps = len(self.bounds) - 1, self.shape[1], self.group["ns_steps"]
        dtype = products_dtype(directions[0].device) if dtype is None else dtype
        stacked = torch.stack(directions).to(dtype)  # (n, local r, c)
        # Rank k owns every world-th matrix: slices, as a list of indices would be uploaded.
        owned = [stacked[(k - self.first_owner) % world :: world] for k in range(world)]
        rows = [end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False)]
        mine = len(owned[self.rank])
        parts = self._exchange(owned, [mine * r * cols for r in rows])
        whole = torch.cat([p.view(mine, r, cols) for p, r in zip(parts, rows, strict=True)], dim=1)
        whole = newton_schulz(whole, steps, self.group["coefficients"], dtype=dtype)
        local = rows[self.rank] * cols
        back = self._exchange(
            list(torch.split(whole, rows, dim=1)), [len(part) * local for part in owned]
        )
        for part, numbers in zip(owned, back, strict=True):
            part.copy_(numbers.view_as(part))  # into `stacked`, which is this call's own
        return list(stacked.unbind())
