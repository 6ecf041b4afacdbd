"""Muon: momentum whose matrices are orthogonalised, batched over equal shapes.

    m_t = μ m + (1 − μ) g                u = (1 − μ) g + μ m_t  (Nesterov, else m_t)
    w_t = (1 − lr · λ) w − lr · s(r, c) · newton_schulz(u)

The scale s makes one learning rate serve matrices of all shapes: ``match_adamw`` is
0.2 √max(r, c), which gives the update the root mean square of AdamW's, so that the learning rate
and decay of AdamW carry over; ``spectral`` is √max(1, r / c).

All matrices of a group with equal shapes, transposed or not, share one momentum tensor
(n, r ≤ c, c); a step gathers their gradients into another and runs one batched iteration on it.
``momentum_buffer`` in the state, as `torch.optim.Muon` names it, is a view of that tensor.

DTensor parameters sharded by rows (FSDP2) keep their momentum sharded; each matrix is gathered by
one rank, orthogonalised there, and handed back in shards (`ShardedBatch`).

Sources: Jordan et al., kellerjordan.github.io/posts/muon; Liu et al., Muon is Scalable for LLM
Training, arXiv:2502.16982 (the AdamW-matching scale).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from operator import is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from .grad_norm import local_tensor
from .newton_schulz import Quintic, newton_schulz, products_dtype, quintics

MUON_SCALES = ("match_adamw", "spectral", "none")


def _shape_scale(scale: str, rows: int, cols: int) -> float:
    if scale == "match_adamw":
        return 0.2 * math.sqrt(max(rows, cols))
    return math.sqrt(max(1.0, rows / cols)) if scale == "spectral" else 1.0


class _Batch:
    """Matrices of one group and of equal shape, up to transposition."""

    def __init__(self, group: dict[str, Any], scale: float) -> None:
        self.group = group
        self.scale = scale
        self.indices: list[int] = []
        self.transposed: list[bool] = []
        self.momenta: list[Tensor] = []  # one, (n, r, c)

    def views(self, stacked: Tensor) -> list[Tensor]:
        """Return the batch's matrices in the shapes of their parameters."""
        pairs = zip(stacked.unbind(), self.transposed, strict=True)
        return [matrix.t() if transposed else matrix for matrix, transposed in pairs]

    def copies(self, grads: list[Any]) -> list[Tensor]:
        """Return copies of gradients, laid out as the momenta."""
        stacked = torch.empty_like(self.momenta[0])
        torch._foreach_copy_(self.views(stacked), grads)
        return [stacked]

    def orthogonalise(self, directions: list[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
        """Return the orthogonalised matrices."""
        steps, coefficients = self.group["ns_steps"], self.group["coefficients"]
        stacked = newton_schulz(directions[0], steps, coefficients, dtype=dtype)
        return self.views(stacked.to(directions[0].dtype))


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

    The directions of equal shape are dealt out to the ranks in turn, from ``first_owner`` on. One
    all-to-all brings every matrix together at its owner, a second one carries the rows of the
    orthogonalised matrix back. A rank sends and receives 2 · (its shards) numbers a step, in the
    dtype of the iteration's products, and does its share of the products; gathering everything
    everywhere would take as many times more of both as there are ranks.
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

    def copies(self, grads: list[Any]) -> list[Tensor]:
        """Return copies of this rank's rows of gradients."""
        dtype = self.momenta[0].dtype
        return [local_tensor(grad).to(dtype, copy=True) for grad in grads]

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
        """Return this rank's rows of the orthogonalised matrices, given its rows of them."""
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


class _Plan:
    """What depends only on which parameters have gradients; kept from step to step."""

    def __init__(self, params: list[Tensor], has_grad: list[bool]) -> None:
        self.params = params
        self.has_grad = has_grad
        self.batches: list[_Batch | ShardedBatch] = []
        self.active: list[Tensor] = []
        self.buffers: list[Tensor] = []

    def fits(
        self, params: list[Tensor], has_grad: list[bool], state: dict[Tensor, dict[str, Any]]
    ) -> bool:
        """Whether nothing that the plan relies on has changed since it was made."""
        return (
            has_grad == self.has_grad
            and all(map(is_, params, self.params))
            and all(
                state.get(param, {}).get("momentum_buffer") is buffer
                for param, buffer in zip(self.active, self.buffers, strict=True)
            )
        )


class Muon(Optimizer):
    """Muon for the matrices of a model; embeddings, heads and vectors belong to `FusedAdamW`.

    Args:
        params: matrices (fp32, bf16, fp16), or dicts of parameter groups.
        lr: learning rate, a float or a 0-dim tensor. With ``scale="match_adamw"`` AdamW's value.
        momentum: decay rate of the momentum.
        nesterov: use the momentum one step ahead.
        weight_decay: decoupled weight decay, multiplied by the learning rate.
        ns_steps: steps of `newton_schulz`.
        coefficients: of `newton_schulz`.
        scale: "match_adamw", "spectral" or "none", see the module's docstring.
        ns_dtype: dtype of the iteration's products; None: as `newton_schulz` chooses.

    Raises:
        ValueError: a hyper-parameter is out of range, or a parameter is not a matrix.
        TypeError: in a step, a DTensor that is neither replicated nor sharded by rows.

    Numerics: momentum in the parameter's dtype. Two runs agree bit for bit. ``state_dict`` is
        interchangeable with `torch.optim.Muon`'s state (``momentum_buffer``).
    Memory: one momentum a parameter; during a step, for one shape at a time, the stacked
        gradients and the iteration's copies.
    Source: kellerjordan.github.io/posts/muon; arXiv:2502.16982.
    """

    reads_clip_on_device = True  # `step` takes clip_coefficient and found_inf

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        coefficients: str | Sequence[Quintic] = "polar_express",
        *,
        scale: str = "match_adamw",
        ns_dtype: torch.dtype | None = None,
    ) -> None:
        self._plan: _Plan | None = None
        self._ns_dtype = ns_dtype
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay,
            "ns_steps": ns_steps, "coefficients": coefficients, "scale": scale,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its hyper-parameters override the defaults."""
        super().add_param_group(param_group)
        self._plan = None
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_ns_dtype": self._ns_dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            _check_group(group)

    def new_state(self, param: Tensor) -> dict[str, Any]:
        """Return the state that the first step makes for a parameter, which may be on meta."""
        return {"momentum_buffer": torch.zeros_like(param)}

    def scratch_bytes(self, n_ranks: int = 1) -> int:
        """Return the most bytes that a step holds beside the state, on each of ``n_ranks``."""
        most = 0
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], int] = {}
            for p in group["params"]:
                rows, cols = sorted(p.shape)
                # Of all matrices of a shape: the stack of gradients, two copies in the iteration
                # and three Gram matrices.
                held = 3 * (rows * cols + rows * rows) * p.element_size()
                if n_ranks > 1:  # of the shards two, of the matrices gathered here three more
                    held = (2 * held + 2 * p.nbytes + 3 * p.nbytes) // n_ranks
                by_shape[rows, cols] = by_shape.get((rows, cols), 0) + held
            most = max([most, *by_shape.values()])
        return most

    def _build_plan(
        self, params: list[Tensor], grads: list[Tensor | None], has_grad: list[bool]
    ) -> _Plan:
        plan = _Plan(params, has_grad)
        groups = [group for group in self.param_groups for _ in group["params"]]
        batches: dict[tuple[Any, ...], _Batch] = {}
        sharded: dict[tuple[Any, ...], ShardedBatch] = {}
        n_sharded = 0  # deals out shapes of few matrices to different ranks
        for i, (param, grad, group) in enumerate(zip(params, grads, groups, strict=True)):
            if grad is None:
                continue
            rows, cols = param.shape
            scale = _shape_scale(group["scale"], rows, cols)
            if local_tensor(param) is not param:  # a DTensor
                ranks = shard_group(param)
                layout = (id(group), scale, (rows, cols), param.dtype, ranks)
                if layout not in sharded:
                    sharded[layout] = ShardedBatch(group, scale, (rows, cols), ranks, n_sharded)
                n_sharded += 1
                state = self.state[param]
                if "momentum_buffer" not in state:
                    state |= self.new_state(param)
                sharded[layout].indices.append(i)
                sharded[layout].momenta.append(local_tensor(state["momentum_buffer"]))
                plan.active.append(param)
                plan.buffers.append(state["momentum_buffer"])
                continue
            shape = (min(rows, cols), max(rows, cols))
            key = (id(group), scale, shape, param.dtype, param.device)
            batch = batches.setdefault(key, _Batch(group, scale))
            batch.indices.append(i)
            batch.transposed.append(rows > cols)
        for (_, _, shape, dtype, device), batch in batches.items():
            size = (len(batch.indices), *shape)
            batch.momenta = [torch.zeros(size, dtype=dtype, device=device)]
            for i, view in zip(batch.indices, batch.views(batch.momenta[0]), strict=True):
                state = self.state[params[i]]
                if "momentum_buffer" in state:
                    view.copy_(state["momentum_buffer"])
                state["momentum_buffer"] = view
                plan.active.append(params[i])
                plan.buffers.append(view)
        plan.batches = [*batches.values(), *sharded.values()]
        return plan

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        clip_coefficient: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> float | None:
        """Update every matrix that has a gradient.

        Args:
            closure: recomputes the loss and the gradients, and returns the loss.
            clip_coefficient: 0-dim fp32 tensor on the parameters' device that multiplies the
                gradients, as `grad_norm` returns it.
            found_inf: 0-dim fp32 tensor; not zero: parameters and momentum stay as they are, bit
                for bit. With sharded parameters it must be the same on all ranks, like the clip
                coefficient and which parameters have gradients.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        has_grad = [grad is not None for grad in grads]
        plan = self._plan
        if plan is None or not plan.fits(params, has_grad, self.state):
            plan = self._plan = self._build_plan(params, grads, has_grad)
        for batch in plan.batches:
            flag = found_inf
            if flag is not None and flag.device.type == "cpu":
                if flag.item() != 0:
                    continue
                flag = None
            self._update(batch, params, grads, clip_coefficient, flag)
        return loss

    def _update(
        self, batch: _Batch | ShardedBatch, params: list[Tensor], grads: list[Any],
        clip_coefficient: Tensor | None, found_inf: Tensor | None,
    ) -> None:  # fmt: skip
        beta, momenta = batch.group["momentum"], batch.momenta
        weights = [local_tensor(params[i]) for i in batch.indices]
        here = batch.copies([grads[i] for i in batch.indices])
        if clip_coefficient is not None:
            torch._foreach_mul_(here, clip_coefficient)
        moved = momenta
        if found_inf is None:
            torch._foreach_lerp_(momenta, here, 1 - beta)
        else:
            moved = list(torch._foreach_lerp(momenta, here, 1 - beta))
        if batch.group["nesterov"]:
            torch._foreach_lerp_(here, moved, beta)
        directions = here if batch.group["nesterov"] else moved
        changes = batch.orthogonalise(directions, self._ns_dtype)
        changes = [change.to(weights[0].dtype) for change in changes]
        _apply(batch, weights, changes, moved, found_inf)


def _apply(
    batch: _Batch | ShardedBatch,
    weights: list[Tensor],
    changes: list[Tensor],
    moved: list[Tensor],
    found_inf: Tensor | None,
) -> None:
    """Decay the weights and add the scaled changes, unless the flag on the device is set."""
    lr, weight_decay = batch.group["lr"], batch.group["weight_decay"]
    if isinstance(lr, Tensor) and lr.device.type == "cpu":
        lr = lr.item()
    decay = 1 - lr * weight_decay
    if found_inf is None:
        if weight_decay != 0:
            torch._foreach_mul_(weights, decay)
        if isinstance(lr, Tensor):
            torch._foreach_mul_(changes, -lr * batch.scale)
            torch._foreach_add_(weights, changes)
        else:
            torch._foreach_add_(weights, changes, alpha=-lr * batch.scale)
        return
    skip = found_inf != 0
    for momentum, value in zip(batch.momenta, moved, strict=True):
        momentum.copy_(torch.where(skip, momentum, value))
    for weight, change in zip(weights, changes, strict=True):
        updated = weight * decay - change * (lr * batch.scale)
        weight.copy_(torch.where(skip, weight, updated))


def _check_group(group: dict[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Muon: a tensor lr must have one element, got {lr.numel()}")
    elif not lr >= 0.0:
        raise ValueError(f"Muon: lr must be >= 0, got {lr}")
    if not 0.0 <= group["momentum"] < 1.0:
        raise ValueError(f"Muon: momentum must be in [0, 1), got {group['momentum']}")
    if not group["weight_decay"] >= 0.0:
        raise ValueError(f"Muon: weight_decay must be >= 0, got {group['weight_decay']}")
    if group["scale"] not in MUON_SCALES:
        raise ValueError(f"Muon: scale must be one of {MUON_SCALES}, got {group['scale']!r}")
    quintics(group["coefficients"], group["ns_steps"])
    for param in group["params"]:
        if param.ndim != 2 or not param.is_floating_point():
            raise ValueError(
                f"Muon: parameters must be floating-point matrices, got shape "
                f"{tuple(param.shape)} and {param.dtype}; give others to FusedAdamW"
            )
