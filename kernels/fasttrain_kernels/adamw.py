"""AdamW with the clip coefficient, the loss scale and the skip flag read inside the update.

    g   = clip_coefficient / grad_scale · grad              (negated with maximize)
    m_t = β₁ m + (1 − β₁) g
    v_t = β₂ v + (1 − β₂) g²
    w_t = (1 − lr · λ) w − lr / (1 − β₁ᵗ) · m_t / (√(v_t / (1 − β₂ᵗ)) + ε)

If ``found_inf`` is not zero nothing changes, not even the step count. Arithmetic is fp32 whatever
the storage; each tensor is rounded once, when it is stored. No reduction takes part, so two runs
agree bit for bit.

State of a parameter, as `torch.optim.AdamW` names it: ``step`` (0-dim fp32), ``exp_avg``,
``exp_avg_sq``; with master weights also ``master`` (fp32). The step counts of all parameters are
views of one vector, so that counting is one operation.

Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization, arXiv:1711.05101.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import reduce, wraps
from operator import or_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._adamw_kernels import adamw_kernel, advance_kernel
from ._dispatch import use_triton
from ._multi_tensor import DeviceNumbers, TensorTable, capturing, keep_for_graph, triton_dtype
from ._optimizer import Plan, PlannedOptimizer
from ._torch import is_step_observed
from ._triton import triton
from .cpu.optimizer import adamw, fits
from .grad_norm import local_tensor

_PROBE = torch.empty(0)  # with it `use_triton` says whether CPU tensors take the Triton path now
_MOMENTS = ("exp_avg", "exp_avg_sq")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HYPER, _COEFS = 10, 10  # columns of the tables: of groups, and of coefficients of tensors


@torch.no_grad()
def adamw_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (param, exp_avg, exp_avg_sq) after update number ``step`` (1, 2, …), in fp64."""
    beta1, beta2 = betas
    g = grad.double() * (-scale if maximize else scale)
    m = beta1 * exp_avg.double() + (1 - beta1) * g
    v = beta2 * exp_avg_sq.double() + (1 - beta2) * g * g
    denominator = (v / (1 - beta2**step)).sqrt() + eps
    decayed = (1 - lr * weight_decay) * param.double()
    return decayed - lr / (1 - beta1**step) * m / denominator, m, v


class TritonClass:
    """Parameters of one device whose operands have the same dtypes and alignment.

    The operands of a parameter are (param, grad, exp_avg, exp_avg_sq[, master]), dense, all of one
    memory order; its step count is 0-dim fp32 on the device.
    """

    def __init__(
        self, operands: list[list[Tensor]], steps: list[Tensor], groups: list[dict[str, Any]],
        aligned: tuple[bool, bool],
    ) -> None:  # fmt: skip
        first = operands[0]
        device = self.device = first[0].device
        self.dtypes = [triton_dtype(t.dtype) for t in first[:4]]
        self.has_master, self.aligned = len(first) == 5, aligned
        self.table = TensorTable([o[0].numel() for o in operands], len(first), device)
        self.groups = list({id(group): group for group in groups}.values())
        n, ids = len(self.groups), [id(group) for group in self.groups]
        rows = [ids.index(id(group)) for group in groups]
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
        self, pointers: list[list[int]], scalars: Sequence[Tensor | None], seed: int | None
    ) -> None:
        """Count the step and update the parameters at the addresses of their operands.

        The scalars are clip coefficient, loss scale and found_inf, each None for none. A seed asks
        for stochastic rounding.
        """
        clip, scale, found_inf = (
            None if x is None else x.to(self.device, torch.float32, non_blocking=True)
            for x in scalars
        )
        table = self.table
        addresses = table.on_device([x for column in zip(*pointers, strict=True) for x in column])
        hyper, lr_pointers, held = self._refresh()
        if capturing(self.device):
            keep_for_graph(self, held)
        with torch.cuda.device_of(self.coefs):
            advance_kernel[(triton.cdiv(table.n_tensors, 1024),)](
                hyper, lr_pointers, self.group_of, self.step_pointers, self.coefs,
                self.coefs if clip is None else clip, self.coefs if scale is None else scale,
                self.coefs if found_inf is None else found_inf, table.n_tensors,
                HYPER=_HYPER, COEFS=_COEFS, HAS_CLIP=clip is not None,
                HAS_SCALE=scale is not None, HAS_FOUND_INF=found_inf is not None, BLOCK=1024,
                num_warps=4,
            )  # fmt: skip
        if table.n_chunks > 0:
            p, g, m, v = self.dtypes
            table.launch(
                adamw_kernel, addresses, table.lengths, table.chunks, self.coefs,
                self.coefs if found_inf is None else found_inf, table.n_tensors,
                table.n_chunks, 0 if seed is None else seed,
                P=p, G=g, M=m, V=v, COEFS=_COEFS, HAS_MASTER=self.has_master,
                HAS_FOUND_INF=found_inf is not None,
                ALIGNED=self.aligned[0], GRAD_ALIGNED=self.aligned[1], ROUND=seed is not None,
            )  # fmt: skip
        del held


class TritonUpdate:
    """The update of a set of parameters, split into the fewest launches."""

    def __init__(self, entries: list[tuple[int, dict[str, Any], dict[str, Any]]]) -> None:
        """Take (index of the parameter, its state, its group) of each parameter."""
        self.entries = entries
        self._signature: list[Any] = []
        self._classes: list[tuple[TritonClass, list[int]]] = []

    def launch(
        self, params: list[Tensor], grads: list[Any], scalars: Sequence[Tensor | None],
        seed: int | None,
    ) -> None:  # fmt: skip
        """Update the parameters in place; the gradients are only read."""
        stored = []
        for i, state, _ in self.entries:
            operands = [params[i], grads[i], state["exp_avg"], state["exp_avg_sq"]]
            if "master" in state:
                operands.append(state["master"])
            stored.append([*map(local_tensor, operands)])
        work = [_one_order(operands) for operands in stored]
        # A gradient may lie in a bucket of DDP's behind one of 2 elements: the rest is read fast.
        pointers = [[t.data_ptr() for t in operands] for operands in work]
        aligned = [((p | reduce(or_, rest)) % 16 == 0, g % 16 == 0) for p, g, *rest in pointers]
        signature = [
            (o[0].device, tuple(t.dtype for t in o), o[0].numel(), a)
            for o, a in zip(work, aligned, strict=True)
        ]
        if signature != self._signature:
            self._classify(work, signature)
        for number, (members, positions) in enumerate(self._classes):
            # Classes of equal size would round with the same noise (odd: golden ratio · 2³²).
            own_seed = None if seed is None else (seed + number * 0x9E3779B1) & 0x7FFFFFFF
            members.launch([pointers[j] for j in positions], scalars, own_seed)
        for originals, copies in zip(stored, work, strict=True):
            for position, (original, copy) in enumerate(zip(originals, copies, strict=True)):
                if original is not copy and position != 1:
                    original.copy_(copy)

    def _classify(self, work: list[list[Tensor]], signature: list[Any]) -> None:
        classes: dict[Any, list[int]] = {}
        for j, (device, dtypes, _, aligned) in enumerate(signature):
            classes.setdefault((device, dtypes, aligned), []).append(j)
        self._classes = []
        for (*_, aligned), positions in classes.items():
            entries = [self.entries[j] for j in positions]
            steps = [state["step"] for _, state, _ in entries]
            groups = [group for _, _, group in entries]
            members = TritonClass([work[j] for j in positions], steps, groups, aligned)
            self._classes.append((members, positions))
        self._signature = signature


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


def update_staged(
    group: dict[str, Any], param: Tensor, grad: Any, state: dict[str, Any], scale: float,
    seed: int | None,
) -> None:  # fmt: skip
    """Update one parameter through contiguous copies in the arithmetic's dtype.

    torch's kernel walks memory from the first element and takes one dtype for all operands, so
    strided tensors, DTensors and mixed dtypes come here. Its step is counted already. A seed asks
    for stochastic rounding of bf16 results.
    """
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    stored = [local_tensor(state.get("master", param).detach())]
    stored += [local_tensor(state[key]) for key in ("exp_avg", "exp_avg_sq")]
    work = [t.to(dtype).contiguous() for t in stored]
    gradient = local_tensor(grad).to(dtype, copy=True, memory_format=torch.contiguous_format)
    weight, first, second = ([t] for t in work)
    arguments = _arguments(group, scale)
    torch._fused_adamw_(weight, [gradient], first, second, [], [state["step"]], **arguments)
    if "master" in state:
        stored.append(local_tensor(param.detach()))
        work.append(work[0])
    for slot, (target, value) in enumerate(zip(stored, work, strict=True)):
        if seed is not None and target.dtype == torch.bfloat16:
            round_stochastic_(target, value, seed=seed + slot)
        elif target is not value:
            target.copy_(value)


def _arguments(group: dict[str, Any], scale: float) -> dict[str, Any]:
    """Keyword arguments of torch's fused kernel."""
    beta1, beta2 = group["betas"]
    arguments = {key: group[key] for key in ("weight_decay", "eps", "amsgrad", "maximize")}
    arguments |= {"lr": float(group["lr"]), "beta1": beta1, "beta2": beta2}
    if scale != 1.0:
        arguments["grad_scale"] = torch.tensor(1.0 / scale if scale else math.inf)
    return arguments


def round_stochastic_(target: Tensor, value: Tensor, *, seed: int) -> None:
    """Store fp32 ``value`` in bf16 ``target``, rounded stochastically; inf and NaN as they are.

    A bf16 is the upper half of an fp32. Adding 16 random bits to the lower half and cutting it off
    rounds up with a probability equal to the part cut off: the expected value of the result is the
    fp32 value. Equal seeds and shapes give equal noise.
    """
    generator = torch.Generator(value.device).manual_seed(seed & (2**63 - 1))
    noise = torch.randint(
        1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator
    )
    bits = value.contiguous().view(torch.int32)
    rounded = ((bits + noise) & ~0xFFFF).view(torch.float32)
    target.copy_(torch.where(value.isfinite(), rounded, value))


class _Plan(Plan):
    """Which way each parameter is updated."""

    def __init__(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        super().__init__(params, grads, "step")
        self.on_triton = use_triton(_PROBE)
        self.dense: list[int] = []  # indices of the parameters in `native`
        self.counters: list[Tensor] = []  # one vector of step counts a device
        self.native: list[tuple[dict[str, Any], list[int], list[dict[str, Any]]]] = []
        self.staged: list[tuple[dict[str, Any], int, dict[str, Any]]] = []
        self.triton: TritonUpdate | None = None

    def fits(self, params: list[Tensor], grads: list[Tensor | None], state: dict[Any, Any]) -> bool:
        """Return whether nothing that the plan relies on has changed since it was made."""
        return (
            super().fits(params, grads, state)
            and self.on_triton == use_triton(_PROBE)
            and all(params[i].is_contiguous() for i in self.dense)
            and all(g.is_contiguous() for i in self.dense if (g := grads[i]) is not None)
        )


def _hooked_on_demand(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a step as torch does, for its hooks and its profiler, where there are any.

    To ask each time in torch's own way takes 0.16 ms of a training step (Zen 3, torch 2.13).
    """
    hooked = Optimizer.profile_hook_step(step)

    @wraps(step)
    def step_or_hooked(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        # A subclass's own step is wrapped by torch.
        watched = type(self).step is step_or_hooked and is_step_observed(self)
        return (hooked if watched else step)(self, *args, **kwargs)

    step_or_hooked.hooked = True  # type: ignore[attr-defined]  # torch need not wrap it again
    return step_or_hooked


class FusedAdamW(PlannedOptimizer):
    """AdamW in one pass over parameters, gradients and moments.

    Args:
        params: parameters (fp32, bf16, fp16; fp64 on the CPU), or dicts of parameter groups.
        lr: learning rate, a float or a 0-dim tensor.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, multiplied by the learning rate.
        maximize: ascend instead of descend.
        capturable: accepted for interchange with torch; this optimizer always is.
        state_dtype: dtype of the moments. None: the parameter's, and fp32 for fp16 parameters.
        master_weights: keep an fp32 copy of every bf16 and fp16 parameter and update that.
        stochastic_rounding: round bf16 parameters and moments stochastically, so that updates
            smaller than half a unit in the last place survive on average.
        seed: of the stochastic rounding; the noise depends on it, the step and the position only.

    Raises:
        ValueError: a hyper-parameter is out of range.
        TypeError: a parameter's dtype is not supported.

    Numerics: fp32 arithmetic. ``state_dict`` and `torch.optim.AdamW`'s can be exchanged in both
        directions; moments load in this optimizer's ``state_dtype`` without a detour through the
        parameter's.
    Memory: two moments a parameter, and 4 bytes an element with master weights.
    """

    _pickled = ("_state_dtype", "_master_weights", "_rounding", "_seed")
    # torch.amp.GradScaler then leaves unscaling and skipping to the step.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        capturable: bool = False,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        if state_dtype not in (None, *_DTYPES[:2]):
            raise ValueError(
                f"FusedAdamW: state_dtype must be float32 or bfloat16, got {state_dtype}; "
                "float16 underflows in the second moment"
            )
        self._state_dtype = state_dtype
        self._master_weights = master_weights
        self._rounding = stochastic_rounding
        self._seed = seed
        # The keys of torch.optim.AdamW's groups. fused=True, because a torch.optim.AdamW that
        # loads this state must keep its step counts on the device.
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": False,
            "maximize": maximize, "foreach": None, "capturable": capturable,
            "differentiable": False, "fused": True, "decoupled_weight_decay": True,
        }  # fmt: skip
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["fused"], group["foreach"] = True, None

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this optimizer's state or a `torch.optim.AdamW`'s (without amsgrad).

        Args:
            state_dict: as ``state_dict()`` returns it. Its tensors are copied.
        """
        loaded: list[dict[str, Any]] = []
        hook = self.register_load_state_dict_pre_hook(lambda _, state: loaded.append(state))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        # torch casts every state tensor to its parameter's dtype: the moments are taken again
        # from the source, so that fp32 moments of a bf16 parameter keep their digits.
        source = loaded[0]
        ids = [i for group in source["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, param in zip(ids, params, strict=True):
            if index not in source["state"]:
                continue
            saved, state = source["state"][index], self.state[param]
            self.state[param] = fresh = self.new_state(param)
            fresh["step"].copy_(torch.as_tensor(saved["step"]))
            fresh.update({k: v for k, v in state.items() if k not in (*fresh, "master")})
            for key in (k for k in ("master", *_MOMENTS) if k in fresh and k in saved):
                fresh[key].copy_(saved[key])

    def new_state(self, param: Tensor) -> dict[str, Any]:
        """Return the state that the first step makes for a parameter, which may be on meta."""
        dtype = self._state_dtype or param.dtype
        if param.dtype == torch.float64:
            dtype = param.dtype
        elif dtype == torch.float16:  # squares of gradients below 2e-4 would be zero
            dtype = torch.float32
        state: dict[str, Any] = {
            "step": torch.zeros((), dtype=torch.float32, device=local_tensor(param).device)
        }
        for key in _MOMENTS:
            state[key] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        if self._master_weights and param.dtype in (torch.bfloat16, torch.float16):
            state["master"] = param.detach().to(torch.float32, copy=True)
        return state

    def _build_plan(self, params: list[Tensor], grads: list[Tensor | None]) -> _Plan:
        plan = _Plan(params, grads)
        groups = [group for group in self.param_groups for _ in group["params"]]
        sets: dict[tuple[torch.device, bool], list[int]] = {}
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            if grad is None:
                continue
            if grad.is_sparse:
                raise RuntimeError(
                    "FusedAdamW: sparse gradients are not supported; use torch.optim.SparseAdam"
                )
            if not self.state[param]:
                self.state[param] = self.new_state(param)
            local = local_tensor(param)
            triton = use_triton(local) and not (local.is_cpu and local.dtype == torch.float64)
            sets.setdefault((local.device, triton), []).append(i)
        entries: list[tuple[int, dict[str, Any], dict[str, Any]]] = []
        batches: dict[tuple[int, torch.dtype, torch.device], Any] = {}
        for (device, triton), indices in sets.items():
            counts = [self.state[params[i]]["step"].to(device, torch.float32) for i in indices]
            counter = torch.stack([count.reshape(()) for count in counts])
            if not triton:
                plan.counters.append(counter)
            for i, step in zip(indices, counter.unbind(), strict=True):
                param, grad, state, group = params[i], grads[i], self.state[params[i]], groups[i]
                state["step"] = step
                plan.add(param, state)
                if triton:
                    entries.append((i, state, group))
                    continue
                stored = (param, grad, *(state[key] for key in _MOMENTS))
                tensors = [local_tensor(t) for t in stored if t is not None]
                plain = (
                    len({t.dtype for t in tensors}) == 1
                    and all(t.is_contiguous() for t in tensors)
                    and tensors[0] is param  # not a DTensor
                    and "master" not in state
                    and not (self._rounding and param.dtype == torch.bfloat16)
                )
                if not plain:
                    plan.staged.append((group, i, state))
                    continue
                key = (id(group), tensors[0].dtype, tensors[0].device)
                plan.dense.append(i)
                _, members, states = batches.setdefault(key, (group, [], []))
                members.append(i)
                states.append(state)
        plan.native = list(batches.values())
        plan.triton = TritonUpdate(entries) if entries else None
        return plan

    @_hooked_on_demand
    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        clip_coefficient: Tensor | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the loss and the gradients, and returns the loss.
            clip_coefficient: 0-dim fp32 tensor on the parameters' device that multiplies the
                gradients, as `grad_norm` returns it.
            grad_scale: 0-dim fp32 tensor that divides the gradients (a loss scale).
            found_inf: 0-dim fp32 tensor; not zero: parameters, moments and step counts stay as
                they are, bit for bit.

        Returns:
            The closure's loss, or None.

        Numerics: gradients are only read; but where torch's own kernel updates on the CPU, for want
            of elements or of a compiler, it scales them in place.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        grad_scale = getattr(self, "grad_scale", None) if grad_scale is None else grad_scale
        found_inf = getattr(self, "found_inf", None) if found_inf is None else found_inf
        params, grads, plan = self._planned()
        if plan.triton is not None:
            scalars = (clip_coefficient, grad_scale, found_inf)
            seed = self._seed if self._rounding else None
            plan.triton.launch(params, grads, scalars, seed)
        if not plan.counters or (found_inf is not None and found_inf.item() != 0):
            return loss
        scale = 1.0 if clip_coefficient is None else clip_coefficient.item()
        if grad_scale is not None:
            scale /= grad_scale.item()
        for counter in plan.counters:
            counter.add_(1)
        for group, indices, states in plan.native:
            # Parameters that torch's fused kernel takes as they are: same group, same dtype.
            first, second, steps = ([s[key] for s in states] for key in (*_MOMENTS, "step"))
            ours, theirs = ([tensors[i] for i in indices] for tensors in (params, grads))
            if fits(ours, theirs, first, second):
                adamw(group, scale, ours, theirs, first, second, steps)
                continue
            options = _arguments(group, scale)
            torch._fused_adamw_(ours, theirs, first, second, [], steps, **options)
        for group, i, state in plan.staged:
            seed = hash((self._seed, i, int(state["step"].item()))) if self._rounding else None
            update_staged(group, params[i], grads[i], state, scale, seed)
        return loss

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for name, beta in zip(("beta1", "beta2"), group["betas"], strict=True):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"FusedAdamW: {name} must be in [0, 1), got {beta}")
        if not group["eps"] >= 0.0:
            raise ValueError(f"FusedAdamW: eps must be >= 0, got {group['eps']}")
        if group["amsgrad"] or group["differentiable"]:
            raise ValueError(
                "FusedAdamW: amsgrad and differentiable are not supported; use torch's"
            )
        for param in group["params"]:
            if param.dtype not in _DTYPES:
                raise TypeError(
                    f"FusedAdamW: parameters must be {[str(d) for d in _DTYPES]}, got {param.dtype}"
                )
