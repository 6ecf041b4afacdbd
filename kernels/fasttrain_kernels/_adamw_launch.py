"""Launches of `FusedAdamW`'s kernels: which parameters share one, and the tables they read."""

import math
from typing import Any

import torch
from torch import Tensor

from ._adamw_kernels import adamw_kernel, advance_kernel
from ._multi_tensor import (
    BLOCK,
    CHUNK,
    DeviceNumbers,
    TensorTable,
    block_warps,
    capturing,
    keep_for_graph,
    launch_grid,
    triton_dtype,
)
from ._triton import triton
from .grad_norm import local_tensor

__all__ = ["TritonClass", "TritonUpdate"]

# Columns of the table of group hyper-parameters, and of the table of a tensor's coefficients.
_HYPER = 10
_COEFS = 10


class TritonClass:
    """Parameters of one device whose operands have the same dtypes and alignment.

    Args:
        operands: for each parameter (param, grad, exp_avg, exp_avg_sq[, master]), dense, all of
            one memory order.
        steps: their step counts, 0-dim fp32 on the device.
        groups: their parameter groups.
    """

    def __init__(
        self, operands: list[list[Tensor]], steps: list[Tensor], groups: list[dict[str, Any]]
    ) -> None:
        first = operands[0]
        device = self.device = first[0].device
        self.dtypes = [triton_dtype(t.dtype) for t in first[:4]]
        self.has_master = len(first) == 5
        self.table = TensorTable([o[0].numel() for o in operands], len(first), device)
        self.groups: list[dict[str, Any]] = []
        rows = []
        for group in groups:
            if not any(group is other for other in self.groups):
                self.groups.append(group)
            rows.append(next(i for i, other in enumerate(self.groups) if other is group))
        n = len(self.groups)
        self.group_of = torch.tensor(rows, dtype=torch.int32).to(device)
        self.hyper = DeviceNumbers((n, _HYPER), torch.float32, device)
        self.lr_pointers = DeviceNumbers((n,), torch.int64, device)
        self.step_pointers = torch.tensor([s.data_ptr() for s in steps]).to(device)
        self.coefs = torch.zeros(len(steps), _COEFS, dtype=torch.float32, device=device)

    def _refresh(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return hyper-parameters, addresses of learning rates, what must outlive the launch."""
        values: list[float] = []
        pointers: list[int] = []
        held: list[Tensor] = []
        for group in self.groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            pointers.append(0)
            if isinstance(lr, Tensor) and lr.device == self.device:
                held.append(lr.detach().to(torch.float32))
                pointers[-1] = held[-1].data_ptr()
                lr = 0.0
            logs = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
            values += [float(lr), group["weight_decay"], beta1, 1 - beta1, beta2, 1 - beta2]
            values += [*logs, group["eps"], -1.0 if group["maximize"] else 1.0]
        return self.hyper.on_device(values), self.lr_pointers.on_device(pointers), held

    def launch(
        self,
        operands: list[list[Tensor]],
        clip: Tensor | None,
        scale: Tensor | None,
        found_inf: Tensor | None,
        seed: int | None,
    ) -> None:
        """Count the step and update the parameters; a seed asks for stochastic rounding."""
        table = self.table
        pointers = [t.data_ptr() for column in zip(*operands, strict=True) for t in column]
        addresses = table.on_device(pointers)
        hyper, lr_pointers, held = self._refresh()
        if capturing(self.device):
            keep_for_graph(self, held)
        with torch.cuda.device_of(self.coefs):  # type: ignore[no-untyped-call]
            advance_kernel[(triton.cdiv(table.n_tensors, 1024),)](
                hyper,
                lr_pointers,
                self.group_of,
                self.step_pointers,
                self.coefs,
                self.coefs if clip is None else clip,
                self.coefs if scale is None else scale,
                self.coefs if found_inf is None else found_inf,
                table.n_tensors,
                HYPER=_HYPER,
                COEFS=_COEFS,
                HAS_CLIP=clip is not None,
                HAS_SCALE=scale is not None,
                HAS_FOUND_INF=found_inf is not None,
                BLOCK=1024,
                num_warps=4,
            )
            if table.n_chunks > 0:
                p, g, m, v = self.dtypes
                adamw_kernel[(launch_grid(table.n_chunks, self.device),)](
                    addresses,
                    table.lengths,
                    table.chunks,
                    self.coefs,
                    self.coefs if found_inf is None else found_inf,
                    table.n_tensors,
                    table.n_chunks,
                    0 if seed is None else seed,
                    P=p,
                    G=g,
                    M=m,
                    V=v,
                    COEFS=_COEFS,
                    HAS_MASTER=self.has_master,
                    HAS_FOUND_INF=found_inf is not None,
                    ALIGNED=not any(pointer % 16 for pointer in pointers),
                    ROUND=seed is not None,
                    CHUNK=CHUNK,
                    BLOCK=BLOCK,
                    num_warps=block_warps(self.coefs),
                )
        del held


class TritonUpdate:
    """The update of a set of parameters, split into the fewest launches."""

    def __init__(self, entries: list[tuple[int, dict[str, Any], dict[str, Any]]]) -> None:
        """Take (index of the parameter, its state, its group) of each parameter."""
        self.entries = entries
        self._signature: list[Any] = []
        self._classes: list[tuple[TritonClass, list[int]]] = []

    def launch(
        self,
        params: list[Tensor],
        grads: list[Any],
        clip: Tensor | None,
        scale: Tensor | None,
        found_inf: Tensor | None,
        seed: int | None,
    ) -> None:
        """Update the parameters in place; the gradients are only read."""
        stored = []
        for i, state, _ in self.entries:
            operands = [params[i], grads[i], state["exp_avg"], state["exp_avg_sq"]]
            if "master" in state:
                operands.append(state["master"])
            stored.append([local_tensor(t.detach()) for t in operands])
        work = [_one_order(operands) for operands in stored]
        signature = [
            (o[0].device, tuple(t.dtype for t in o), o[0].numel(), _aligned(o)) for o in work
        ]
        if signature != self._signature:
            self._classify(work, signature)
        for number, (members, positions) in enumerate(self._classes):
            device = members.device
            # Classes of equal size would round with the same noise (odd: golden ratio · 2³²).
            own_seed = None if seed is None else (seed + number * 0x9E3779B1) & 0x7FFFFFFF
            members.launch(
                [work[j] for j in positions],
                _scalar(clip, device),
                _scalar(scale, device),
                _scalar(found_inf, device),
                own_seed,
            )
        for originals, copies in zip(stored, work, strict=True):
            for position, (original, copy) in enumerate(zip(originals, copies, strict=True)):
                if original is not copy and position != 1:
                    original.copy_(copy)

    def _classify(self, work: list[list[Tensor]], signature: list[Any]) -> None:
        classes: dict[Any, list[int]] = {}
        for j, (device, dtypes, _, aligned) in enumerate(signature):
            classes.setdefault((device, dtypes, aligned), []).append(j)
        self._classes = []
        for positions in classes.values():
            entries = [self.entries[j] for j in positions]
            steps = [state["step"] for _, state, _ in entries]
            groups = [group for _, _, group in entries]
            members = TritonClass([work[j] for j in positions], steps, groups)
            self._classes.append((members, positions))
        self._signature = signature


def _aligned(operands: list[Tensor]) -> bool:
    return not any(t.data_ptr() % 16 for t in operands)


def _one_order(operands: list[Tensor]) -> list[Tensor]:
    """Return the operands with their elements at equal offsets, copied where they are not."""
    if all(t.is_contiguous() for t in operands):
        return operands
    param = operands[0]
    strides = torch.empty(param.shape, device="meta").stride()
    if torch.ops.aten.is_non_overlapping_and_dense.default(param):
        strides = param.stride()
    return [
        t
        if t.stride() == strides
        else torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)
        for t in operands
    ]


def _scalar(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device, torch.float32, non_blocking=True)
