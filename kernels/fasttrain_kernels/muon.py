"""Muon: momentum whose matrices are orthogonalised, batched over equal shapes.

    m_t = μ m + (1 − μ) g                u = (1 − μ) g + μ m_t  (Nesterov, else m_t)
    w_t = (1 − lr · λ) w − lr · s(r, c) · newton_schulz(u)

The scale s makes one learning rate serve matrices of all shapes: ``match_adamw`` is
0.2 √max(r, c), which gives the update the root mean square of AdamW's, so that the learning rate
and decay of AdamW carry over; ``spectral`` is √max(1, r / c).

Matrices of a group with equal shapes are orthogonalised as one stack. On CUDA one launch before it
brings momenta up to date and stacks the directions, in fp32, since half precision has no room for
what is not scaled yet; one after it changes the weights: 16 and 10 bytes an fp32 parameter with
products in half precision, whatever clipping, decay and a flag to skip the step ask for. Their
arithmetic is fp32; each number is rounded once, when it is stored.

DTensor parameters sharded by rows (FSDP2) keep their momentum sharded; each matrix is gathered by
one rank, orthogonalised there, and handed back in shards.

Sources: Jordan et al., kellerjordan.github.io/posts/muon; Liu et al., Muon is Scalable for LLM
Training, arXiv:2502.16982 (the AdamW-matching scale).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._dispatch import launches_triton
from ._multi_tensor import TensorTable, load_pointer, triton_dtype
from ._optimizer import FusedOptimizer, PreparedStep, number_in, wrap_step
from ._triton import tl, triton
from .grad_norm import local_tensor
from .newton_schulz import (
    Quintic,
    largest_elements,
    newton_schulz,
    products_dtype,
    quintics,
    times_power_of_two,
)

MUON_SCALES = ("match_adamw", "spectral", "none")
# torch.optim.Muon's adjust_lr_fn. It takes what it does not know, in a state, for no adjustment.
_ADJUST_LR_FNS = {"match_adamw": "match_rms_adamw", "spectral": "original", "none": "none"}
_TORCH_EPS = 1e-7  # torch.optim.Muon's default; `newton_schulz` needs none
# Shards are scaled by powers of 2^8: bf16 holds their exponents, from -134 to 128 in fp64.
_BITS = 8
_OF_ZEROS = -256  # the exponent of a shard of zeros, below all others
_HEADROOM = 15  # scaled elements are at most 2^15: most of fp16's range is left for smaller ones


@triton.jit
def muon_direction_kernel(
    pointers_ptr,
    chunks_ptr,
    out_ptr,
    clip_ptr,
    found_inf_ptr,
    n_tensors,
    n_chunks,
    n_elements,
    blend,
    G: tl.constexpr,
    M: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
    NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """m ← m + (1 − μ)(g − m); write m, with Nesterov one step ahead, to the stack."""
    if HAS_FOUND_INF:  # a loop over no chunks writes nothing
        n_chunks = tl.where(tl.load(found_inf_ptr) == 0, n_chunks, 0)
    for k in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        t = tl.load(chunks_ptr + 2 * k).to(tl.int64)
        start = tl.load(chunks_ptr + 2 * k + 1).to(tl.int64) * CHUNK
        g_ptr = load_pointer(pointers_ptr, t, G, ALIGNED)
        m_ptr = load_pointer(pointers_ptr + n_tensors, t, M, ALIGNED)
        for i in range(0, CHUNK, BLOCK):
            offsets = start + i + tl.arange(0, BLOCK)
            mask = offsets < n_elements
            g = tl.load(g_ptr + offsets, mask=mask).to(tl.float32)
            if HAS_CLIP:
                g *= tl.load(clip_ptr)
            m = tl.load(m_ptr + offsets, mask=mask).to(tl.float32)
            m += blend * (g - m)
            tl.store(m_ptr + offsets, m.to(M), mask=mask)
            if NESTEROV:
                m += blend * (g - m)
            out = t * n_elements + offsets
            tl.store(out_ptr + out, m.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def muon_apply_kernel(
    pointers_ptr,
    chunks_ptr,
    change_ptr,
    lr_ptr,
    found_inf_ptr,
    n_tensors,
    n_chunks,
    n_elements,
    lr,
    weight_decay,
    scale,
    W: tl.constexpr,
    HAS_LR: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """w ← (1 − lr·λ) w − lr·scale·change."""
    if HAS_FOUND_INF:
        n_chunks = tl.where(tl.load(found_inf_ptr) == 0, n_chunks, 0)
    if HAS_LR:
        lr = tl.load(lr_ptr).to(tl.float32)
    for k in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        t = tl.load(chunks_ptr + 2 * k).to(tl.int64)
        start = tl.load(chunks_ptr + 2 * k + 1).to(tl.int64) * CHUNK
        w_ptr = load_pointer(pointers_ptr + 2 * n_tensors, t, W, ALIGNED)
        for i in range(0, CHUNK, BLOCK):
            offsets = start + i + tl.arange(0, BLOCK)
            mask = offsets < n_elements
            w = tl.load(w_ptr + offsets, mask=mask).to(tl.float32)
            change = tl.load(change_ptr + t * n_elements + offsets, mask=mask).to(tl.float32)
            w = w * (1 - lr * weight_decay) - change * (lr * scale)
            tl.store(w_ptr + offsets, w.to(W), mask=mask)


def _shape_scale(scale: str, rows: int, cols: int) -> float:
    if scale == "match_adamw":
        return 0.2 * math.sqrt(max(rows, cols))
    return math.sqrt(max(1.0, rows / max(1, cols))) if scale == "spectral" else 1.0


def _ns_coefficients(coefficients: str | Sequence[Quintic], steps: int) -> Quintic:
    """Return the triple that stands for these in torch.optim.Muon, which has one for all steps."""
    first, *others = quintics(coefficients, steps)
    a, b, c = first if all(other == first for other in others) else quintics("quintic", 1)[0]
    return a, b, c


def _scale_of(adjust_lr_fn: str | None) -> str:
    """Return this optimizer's name of torch.optim.Muon's ``adjust_lr_fn``."""
    if adjust_lr_fn is None:
        return "spectral"
    for scale, theirs in _ADJUST_LR_FNS.items():
        if adjust_lr_fn == theirs:
            return scale
    raise ValueError(
        "Muon: adjust_lr_fn must be 'original' (scale='spectral') or 'match_rms_adamw' "
        f"(scale='match_adamw'), got {adjust_lr_fn!r}"
    )


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


def _packed(shards: Tensor, dtype: torch.dtype) -> Tensor:
    """Return shards (n, local r, c) scaled, in ``dtype``, as rows that end in their exponents.

    A shard is its row's other numbers times 2^(8 · exponent − 15).
    """
    n = len(shards)
    packed = torch.empty(n, shards[0].numel() + 1, dtype=dtype, device=shards.device)
    if shards[0].numel() == 0:
        return packed.fill_(_OF_ZEROS)
    largest = largest_elements(shards)
    exponent = -(-torch.frexp(largest).exponent // _BITS)
    exponent = exponent.clamp(-135, 128)  # the exponent of NaN or infinity is arbitrary
    scaled = times_power_of_two(shards, _HEADROOM - _BITS * exponent, dtype)
    packed[:, :-1] = scaled.view(n, -1)
    packed[:, -1:] = torch.where(largest == 0, _OF_ZEROS, exponent).view(n, 1)
    return packed


def _unpacked(parts: list[Tensor], cols: int) -> Tensor:
    """Return matrices (n, r, c) of the shards that the ranks packed, up to a power of two each."""
    exponent = torch.stack([part[:, -1] for part in parts])
    less = (_BITS * (exponent - exponent.amax(0)).long()).clamp_min(-1000)
    shards = [
        times_power_of_two(part[:, :-1].unflatten(1, (-1, cols)), e.view(-1, 1, 1), part.dtype)
        for part, e in zip(parts, less, strict=True)
    ]
    return torch.cat(shards, dim=1)


class MatrixStack:
    """Matrices of one group, shape and layout, of which this rank holds some rows each, or all.

    Sharded directions are dealt out to the ranks in turn, from ``first_owner`` on. One
    all-to-all brings every matrix together at its owner, a second one carries the rows of the
    orthogonalised matrix back. A rank sends and receives 2 · (its shards) numbers a step, in the
    dtype of the iteration's products, and does its share of the products; gathering everything
    everywhere would take as many times more of both as there are ranks. Before it is rounded to
    that dtype, a shard is scaled by a power of two, whose exponent travels with it.
    """

    def __init__(
        self,
        group: dict[str, Any],
        scale: float,
        shape: tuple[int, int],
        ranks: dist.ProcessGroup | None,
        first_owner: int,
        number: int = 0,
    ) -> None:
        self.group, self.scale, self.shape = group, scale, shape
        self.number = number  # of the group, which is another dictionary in the next step perhaps
        self.ranks, self.first_owner = ranks, first_owner
        self.indices: list[int] = []
        self.momenta: list[Tensor] = []  # the local rows, (local r, c) each
        self.table: TensorTable | None = None
        world = 1 if ranks is None else dist.get_world_size(ranks)
        chunk = -(-shape[0] // world)
        self.rank = 0 if ranks is None else dist.get_rank(ranks)
        # Rows bounds[k] to bounds[k + 1] of every matrix are with rank k: Shard cuts like chunk().
        self.bounds = [min(k * chunk, shape[0]) for k in range(world + 1)]

    def _exchange(self, pieces: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """Send piece k to rank k; return what the ranks sent here, ``sizes`` numbers each."""
        flat = [piece.reshape(-1) for piece in pieces]
        received = flat[0].new_empty(sum(sizes))
        counts = [piece.numel() for piece in flat]
        dist.all_to_all_single(received, torch.cat(flat), sizes, counts, group=self.ranks)
        return list(torch.split(received, sizes))

    def orthogonalise(self, stacked: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows of the orthogonalised matrices, given theirs, (n, local r, c)."""
        cols, steps = self.shape[1], self.group["ns_steps"]
        coefficients = self.group["coefficients"]
        if self.ranks is None:
            return newton_schulz(stacked, steps, coefficients, dtype=dtype)
        world, local = len(self.bounds) - 1, stacked[0].numel()
        rows = [end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False)]
        packed = _packed(stacked, dtype)
        # Rank k owns every world-th matrix: slices, as a list of indices would be uploaded.
        owned = [slice((k - self.first_owner) % world, None, world) for k in range(world)]
        mine = len(stacked[owned[self.rank]])
        widths = [r * cols + 1 for r in rows]
        parts = self._exchange([packed[which] for which in owned], [mine * w for w in widths])
        shards = [part.view(mine, w) for part, w in zip(parts, widths, strict=True)]
        whole = _unpacked(shards, cols)
        whole = newton_schulz(whole, steps, coefficients, dtype=dtype)
        back = self._exchange(
            list(torch.split(whole, rows, dim=1)), [len(stacked[which]) * local for which in owned]
        )
        out = torch.empty_like(stacked, dtype=dtype)
        for which, numbers in zip(owned, back, strict=True):
            out[which] = numbers.view_as(out[which])
        return out

    def update(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        dtype: torch.dtype,
        clip: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Update the weights with kernels, which read clip coefficient and flag themselves."""
        size, device = weights[0].numel(), weights[0].device
        columns = [grads, self.momenta, weights]
        work = [[t.contiguous() for t in column] for column in columns]
        if self.table is None:
            self.table = TensorTable([size] * len(weights), len(columns), device)
        table, group = self.table, self.group
        pointers = [t.data_ptr() for column in work for t in column]
        addresses = table.on_device(pointers)
        flags = {"ALIGNED": not any(p % 16 for p in pointers)}
        flags["HAS_FOUND_INF"] = found_inf is not None
        stack = len(weights), *weights[0].shape
        stacked = torch.empty(stack, dtype=torch.float32, device=device)
        clip, flag = (
            None if x is None else x.to(device, torch.float32, non_blocking=True)
            for x in (clip, found_inf)
        )
        lr = group["lr"]
        lr_ptr = lr if isinstance(lr, Tensor) and lr.device == device else None
        shape = table.n_tensors, table.n_chunks, size
        table.launch(
            muon_direction_kernel,
            addresses,
            table.chunks,
            stacked,
            stacked if clip is None else clip,
            stacked if flag is None else flag,
            *shape,
            1 - group["momentum"],
            G=triton_dtype(grads[0].dtype),
            M=triton_dtype(self.momenta[0].dtype),
            HAS_CLIP=clip is not None,
            NESTEROV=group["nesterov"],
            **flags,
        )
        changes = self.orthogonalise(stacked, dtype).contiguous()
        table.launch(
            muon_apply_kernel,
            addresses,
            table.chunks,
            changes,
            changes if lr_ptr is None else lr_ptr,
            changes if flag is None else flag,
            *shape,
            0.0 if lr_ptr is not None else float(lr),
            group["weight_decay"],
            self.scale,
            W=triton_dtype(weights[0].dtype),
            HAS_LR=lr_ptr is not None,
            **flags,
        )
        for originals, copies in zip(columns[1:], work[1:], strict=True):
            for original, copy in zip(originals, copies, strict=True):
                if original is not copy:
                    original.copy_(copy)

    def update_in_torch(
        self, weights: list[Tensor], grads: list[Tensor], dtype: torch.dtype, clip: Tensor | None
    ) -> None:
        """The same, on a CPU, also of matrices that are equal in shape but for transposition."""
        beta, decay = self.group["momentum"], self.group["weight_decay"]
        # What is kept in half precision is computed with in fp32, and rounded once.
        wide = torch.promote_types(self.momenta[0].dtype, torch.float32)
        here = [grad.to(wide) for grad in grads]
        if clip is not None:
            here = list(torch._foreach_mul(here, clip))
        momenta = [m.to(wide) for m in self.momenta]
        torch._foreach_lerp_(momenta, here, 1 - beta)
        if self.momenta[0].dtype != wide:
            torch._foreach_copy_(self.momenta, momenta)
        ahead = momenta
        if self.group["nesterov"]:
            ahead = list(torch._foreach_lerp(here, ahead, beta))
        turned = [self.ranks is None and w.shape[0] > w.shape[1] for w in weights]  # to be wide
        stacked = torch.stack([x.mT if turn else x for x, turn in zip(ahead, turned, strict=True)])
        del here, momenta, ahead  # as large as what the iteration holds
        wide = torch.promote_types(weights[0].dtype, torch.float32)
        pairs = zip(self.orthogonalise(stacked, dtype).to(wide), turned, strict=True)
        changes = [x.mT if turn else x for x, turn in pairs]
        updated = [weight.to(wide) for weight in weights]
        lr = float(self.group["lr"])
        if decay != 0:
            torch._foreach_mul_(updated, 1 - lr * decay)
        torch._foreach_add_(updated, changes, alpha=-lr * self.scale)
        if weights[0].dtype != wide:
            torch._foreach_copy_(weights, updated)


def _is_for_triton(weight: Tensor) -> bool:
    return launches_triton(weight) and weight.dtype != torch.float64


class _PreparedStep(PreparedStep):
    """The stacks of matrices that are updated together."""

    def __init__(self, layout: list[Any], params: list[Tensor], grads: list[Tensor | None]) -> None:
        super().__init__(layout, params, grads, ["momentum_buffer"])
        self.stacks: list[MatrixStack] = []


class Muon(FusedOptimizer):
    """Muon for the matrices of a model; embeddings, heads and vectors belong to `FusedAdamW`.

    Args:
        params: matrices (fp32, bf16, fp16), or dicts of parameter groups.
        lr: learning rate, a float or a tensor of one element. With ``scale="match_adamw"``, use the
            value that you would use for AdamW.
        momentum: decay rate of the momentum.
        nesterov: use the momentum one step ahead.
        weight_decay: decoupled weight decay, multiplied by the learning rate.
        ns_steps: number of steps of `newton_schulz`.
        coefficients: those of `newton_schulz`.
        scale: "match_adamw", "spectral" or "none", see the module's docstring.
        ns_dtype: dtype of the iteration's products; None: as `newton_schulz` chooses.
        ns_coefficients: torch.optim.Muon's name of one triple (a, b, c) for all steps.
        eps: ignored, kept for torch.optim.Muon; directions here do not depend on a norm's size.
        adjust_lr_fn: torch.optim.Muon's name of the scale, "match_rms_adamw" for "match_adamw" or
            "original" for "spectral".

    Raises:
        ValueError: a hyper-parameter is out of range, or a parameter is not a matrix.
        TypeError: in a step, a DTensor that is neither replicated nor sharded by rows.

    Numerics: momentum in the parameter's dtype. Two runs agree bit for bit. Of a parameter listed
        several times, each occurrence is an update, one after the other.
        Beside `torch.optim.Muon`: other defaults (its are ``lr=1e-3``, ``weight_decay=0.1``,
        ``ns_coefficients=(3.4445, -4.775, 2.0315)``, ``adjust_lr_fn="original"``) and another order
        of arguments, so pass them by name. ``state_dict`` can be exchanged with it in both
        directions; groups have its settings too. Where steps have coefficients of their own, it
        goes on with its default.
    Memory: one momentum a parameter; during a step, for one shape at a time, the stacked
        gradients and the iteration's copies.
    Source: kellerjordan.github.io/posts/muon; arXiv:2502.16982.
    """

    _pickled = ("_ns_dtype",)
    _loadable = "Muon or torch.optim.Muon"
    _group_keys = ("lr", "momentum", "nesterov", "weight_decay", "ns_steps")
    _state_keys = ("momentum_buffer",)
    _moments = ("momentum_buffer",)

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
        ns_coefficients: Quintic | None = None,
        eps: float = _TORCH_EPS,
        adjust_lr_fn: str | None = None,
    ) -> None:
        self._ns_dtype = ns_dtype
        if ns_coefficients is not None:
            if coefficients != "polar_express":
                raise ValueError("Muon: pass either coefficients or ns_coefficients")
            coefficients = [ns_coefficients]
        if adjust_lr_fn is not None:
            if scale not in ("match_adamw", _scale_of(adjust_lr_fn)):
                raise ValueError("Muon: pass either scale or adjust_lr_fn")
            scale = _scale_of(adjust_lr_fn)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "ns_steps": ns_steps,
            "coefficients": coefficients,
            "scale": scale,
            "eps": eps,
        }
        super().__init__(params, defaults)

    def state_dict(self) -> dict[str, Any]:
        """Return the state and the groups' settings, under torch.optim.Muon's names too."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            steps, coefficients = group["ns_steps"], group["coefficients"]
            group["ns_coefficients"] = _ns_coefficients(coefficients, steps)
            group["adjust_lr_fn"] = _ADJUST_LR_FNS[group["scale"]]
        return saved

    def _adopt(self, group: dict[str, Any]) -> None:
        if "adjust_lr_fn" in group:
            group["scale"] = _scale_of(group.pop("adjust_lr_fn"))
        if "ns_coefficients" in group:
            triple = tuple(group.pop("ns_coefficients"))
            jordan = quintics("quintic", 1)[0]
            group["coefficients"] = "quintic" if triple == jordan else [triple]

    def _accept(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = [dict(group) for group in state_dict["param_groups"]]
        for group in groups:
            if "coefficients" in group:  # else it is torch.optim.Muon's own
                same = _ns_coefficients(group["coefficients"], group.get("ns_steps", 1))
                if group.get("ns_coefficients") == same:  # unchanged since this optimizer wrote it
                    del group["ns_coefficients"]
        return super()._accept({**state_dict, "param_groups": groups})

    def _layout(self) -> list[Any]:
        for group in self.param_groups:
            self._adopt(group)
        return [(len(group["params"]), group["scale"]) for group in self.param_groups]

    def new_state(self, param: Tensor) -> dict[str, Any]:
        """Return the state that the first step makes for a parameter, which may be on meta."""
        return {"momentum_buffer": torch.zeros_like(param)}

    def scratch_bytes(self, n_ranks: int = 1) -> int:
        """Return the most bytes that a step holds beside the state, on each of ``n_ranks``."""
        held: Counter[Any] = Counter()  # for the matrices of a group and shape
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                rows, cols = sorted(p.shape)
                # The stack of gradients, two copies in the iteration and three Gram matrices.
                own = 3 * (rows * cols + rows * rows) * p.element_size()
                if n_ranks > 1:  # of the shards two, of the matrices gathered here three more
                    own = (2 * own + 2 * p.nbytes + 3 * p.nbytes) // n_ranks
                held[number, tuple(p.shape)] += own
        return max(held.values(), default=0)

    def _prepare(
        self, layout: list[Any], params: list[Tensor], grads: list[Tensor | None]
    ) -> _PreparedStep:
        prepared = _PreparedStep(layout, params, grads)
        numbers = [n for n, group in enumerate(self.param_groups) for _ in group["params"]]
        occurrences: Counter[Tensor] = Counter()
        stacks: dict[tuple[Any, ...], MatrixStack] = {}
        n_sharded = 0  # deals out shapes of few matrices to different ranks
        for i, (param, grad, number) in enumerate(zip(params, grads, numbers, strict=True)):
            if grad is None:
                continue
            group = self.param_groups[number]
            rows, cols = param.shape
            is_whole = local_tensor(param) is param  # not a DTensor
            ranks = None if is_whole else shard_group(param)
            scale = _shape_scale(group["scale"], rows, cols)
            shape = (rows, cols)
            if is_whole and not _is_for_triton(param):
                shape = (min(shape), max(shape))
            state = self._state_of(param, grad)
            momentum = state["momentum_buffer"]
            dtypes = (param.dtype, grad.dtype, momentum.dtype)
            key = (occurrences[param], number, scale, shape, dtypes, param.device, ranks)
            occurrences[param] += 1
            if key not in stacks:
                stacks[key] = MatrixStack(group, scale, shape, ranks, n_sharded, number)
            n_sharded += not is_whole
            stacks[key].indices.append(i)
            stacks[key].momenta.append(local_tensor(momentum))
            prepared.add(param, state)
        # One after the other what is listed several times; else in the order of the parameters.
        prepared.stacks = [stacks[key] for key in sorted(stacks, key=itemgetter(0))]
        return prepared

    @wrap_step
    def step(
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
        loss = None if closure is None else torch.enable_grad()(closure)()
        params, grads, prepared = self._prepared_step()
        for stack in prepared.stacks:
            stack.group = self.param_groups[stack.number]
            weights = [local_tensor(params[i]) for i in stack.indices]
            here = [local_tensor(g) for i in stack.indices if (g := grads[i]) is not None]
            dtype = self._ns_dtype or products_dtype(weights[0].device)
            if _is_for_triton(weights[0]):
                stack.update(weights, here, dtype, clip_coefficient, found_inf)
                torch.autograd.graph.increment_version([params[i] for i in stack.indices])
            elif number_in(found_inf, 0.0) == 0:
                stack.update_in_torch(weights, here, dtype, clip_coefficient)
        return loss

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not 0.0 <= group["momentum"] < 1.0:
            raise ValueError(f"Muon: momentum must be in [0, 1), got {group['momentum']}")
        if group["scale"] not in MUON_SCALES:
            raise ValueError(f"Muon: scale must be one of {MUON_SCALES}, got {group['scale']!r}")
        if isinstance(group["nesterov"], float):
            raise ValueError(
                f"Muon: nesterov must be True or False, got {group['nesterov']}; pass arguments by "
                "name, as torch.optim.Muon has them in another order"
            )
        quintics(group["coefficients"], group["ns_steps"])

    def _check_param(self, param: Tensor) -> None:
        if param.ndim != 2 or not param.is_floating_point():
            raise ValueError(
                f"Muon: parameters must be floating-point matrices, got shape "
                f"{tuple(param.shape)} and {param.dtype}; give others to FusedAdamW"
            )
