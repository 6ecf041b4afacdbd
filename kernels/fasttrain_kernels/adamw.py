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
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from ._adamw_kernels import adamw_kernel, advance_kernel
from ._dispatch import launches_triton
from ._multi_tensor import DeviceNumbers, TensorTable, capturing, keep_for_graph, triton_dtype
from ._optimizer import FusedOptimizer, PreparedStep, number_in, wrap_step
from ._triton import triton
from .cpu.optimizer import adamw, fits
from .grad_norm import local_tensor

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
        self,
        operands: list[list[Tensor]],
        steps: list[Tensor],
        group_numbers: list[int],
        aligned: tuple[bool, bool],
    ) -> None:
        first = operands[0]
        device = self.device = first[0].device
        self.dtypes = [triton_dtype(t.dtype) for t in first[:4]]
        self.has_master, self.aligned = len(first) == 5, aligned
        self.table = TensorTable([o[0].numel() for o in operands], len(first), device)
        self.group_numbers = sorted(set(group_numbers))
        n = len(self.group_numbers)
        rows = [self.group_numbers.index(number) for number in group_numbers]
        self.group_of = torch.tensor(rows, dtype=torch.int32, device="cpu").to(device)
        self.hyper = DeviceNumbers((n, _HYPER), torch.float32, device)
        self.lr_pointers = DeviceNumbers((n,), torch.int64, device)
        addresses = [step.data_ptr() for step in steps]
        self.step_pointers = torch.tensor(addresses, dtype=torch.int64, device="cpu").to(device)
        self.coefs = torch.zeros(len(steps), _COEFS, dtype=torch.float32, device=device)

    def _refresh(self, groups: list[dict[str, Any]]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return hyper-parameters, addresses of learning rates, what must outlive the launch."""
        values: list[float] = []
        pointers: list[int] = []
        held: list[Tensor] = []
        for number in self.group_numbers:
            group = groups[number]
            lr, (beta1, beta2) = group["lr"], group["betas"]
            pointers.append(0)
            if isinstance(lr, Tensor) and lr.device == self.device:
                held.append(lr.detach().to(torch.float32))
                pointers[-1] = held[-1].data_ptr()
                lr = 0.0
            logs = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
            values += [float(lr), float(group["weight_decay"])]
            values += [beta1, 1 - beta1, beta2, 1 - beta2]
            values += [*logs, float(group["eps"]), -1.0 if group["maximize"] else 1.0]
        return self.hyper.on_device(values), self.lr_pointers.on_device(pointers), held

    def launch(
        self,
        pointers: list[list[int]],
        groups: list[dict[str, Any]],
        scalars: Sequence[Tensor | None],
        seed: int | None,
    ) -> None:
        """Count the step and update the parameters at the addresses of their operands.

        The groups are all of the optimizer's. The scalars are clip coefficient, loss scale and
        found_inf, each None for none. A seed asks for stochastic rounding.
        """
        clip, scale, found_inf = (
            None if x is None else x.to(self.device, torch.float32, non_blocking=True)
            for x in scalars
        )
        table = self.table
        addresses = table.on_device([x for column in zip(*pointers, strict=True) for x in column])
        hyper, lr_pointers, held = self._refresh(groups)
        if capturing(self.device):
            keep_for_graph(self, held)
        with torch.cuda.device_of(self.coefs):
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
            table.launch(
                adamw_kernel,
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
                ALIGNED=self.aligned[0],
                GRAD_ALIGNED=self.aligned[1],
                ROUND=seed is not None,
            )
        del held


class TritonUpdate:
    """The update of a set of parameters, split into the fewest launches."""

    def __init__(self, entries: list[tuple[int, dict[str, Any], int]]) -> None:
        """Take (index of the parameter, its state, number of its group) of each parameter."""
        self.entries = entries
        self._signature: list[Any] = []
        self._classes: list[tuple[TritonClass, list[int]]] = []

    def launch(
        self,
        params: list[Tensor],
        grads: list[Any],
        groups: list[dict[str, Any]],
        scalars: Sequence[Tensor | None],
        seed: int | None,
    ) -> None:
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
            members.launch([pointers[j] for j in positions], groups, scalars, own_seed)
        for originals, copies in zip(stored, work, strict=True):
            for position, (original, copy) in enumerate(zip(originals, copies, strict=True)):
                if original is not copy and position != 1:
                    original.copy_(copy)
        torch.autograd.graph.increment_version([params[i] for i, _, _ in self.entries])

    def _classify(self, work: list[list[Tensor]], signature: list[Any]) -> None:
        classes: dict[Any, list[int]] = {}
        for j, (device, dtypes, _, aligned) in enumerate(signature):
            classes.setdefault((device, dtypes, aligned), []).append(j)
        self._classes = []
        for (*_, aligned), positions in classes.items():
            entries = [self.entries[j] for j in positions]
            steps = [state["step"] for _, state, _ in entries]
            numbers = [number for _, _, number in entries]
            members = TritonClass([work[j] for j in positions], steps, numbers, aligned)
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
    group: dict[str, Any],
    param: Tensor,
    grad: Any,
    state: dict[str, Any],
    scale: float,
    seed: int | None,
) -> None:
    """Update one parameter through contiguous copies in the arithmetic's dtype.

    torch's kernel walks memory from the first element and takes one dtype for all operands, so
    strided tensors, DTensors and mixed dtypes come here. Its step is counted already. A seed asks
    for stochastic rounding of bf16 results.
    """
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    stored = [local_tensor(state.get("master", param).detach())]
    stored += [local_tensor(state[key]) for key in _MOMENTS]
    work = [t.to(dtype).contiguous() for t in stored]
    if "master" in state:
        work[0] = _taken_over(local_tensor(param.detach()), work[0], seed is not None)
    gradients = _scaled([local_tensor(grad).to(dtype).contiguous()], scale)
    weight, first, second = ([t] for t in work)
    torch._fused_adamw_(weight, gradients, first, second, [], [state["step"]], **_arguments(group))
    if "master" in state:
        stored.append(local_tensor(param.detach()))
        work.append(work[0])
    for slot, (target, value) in enumerate(zip(stored, work, strict=True)):
        if seed is not None and target.dtype == torch.bfloat16:
            round_stochastic_(target, value, seed=seed + slot)
        elif target is not value:
            target.copy_(value)


def _taken_over(param: Tensor, master: Tensor, is_stochastic: bool) -> Tensor:
    """Return the master, and the parameter in fp32 where it is not the master rounded.

    There others have changed it since the last step: loaded, clamped or reset it.
    """
    stored = param.to(torch.float32).contiguous()
    same = master.to(param.dtype) == param
    if is_stochastic and param.dtype == torch.bfloat16:  # either neighbour
        distance = stored.view(torch.int32).long() - master.view(torch.int32).long()
        same |= master.isfinite() & (distance.abs() < 1 << 16)
    return torch.where(same, master, stored)


def _arguments(group: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of torch's fused kernel."""
    beta1, beta2 = group["betas"]
    arguments: dict[str, Any] = {"lr": float(group["lr"]), "beta1": beta1, "beta2": beta2}
    arguments |= {"weight_decay": float(group["weight_decay"]), "eps": float(group["eps"])}
    return arguments | {"amsgrad": False, "maximize": bool(group["maximize"])}


def _scaled(grads: list[Tensor], scale: float) -> list[Tensor]:
    """Return gradients times a scale; torch's fused kernel would write them over the originals."""
    if scale == 1.0:
        return grads
    return list(torch._foreach_div(grads, 1.0 / scale if scale else math.inf))


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


class _Round:
    """Which way each parameter is updated; each is in it once."""

    def __init__(self) -> None:
        self.counters: list[Tensor] = []  # one vector of step counts a device
        self.native: list[tuple[int, list[int], list[dict[str, Any]]]] = []  # by group number
        self.staged: list[tuple[int, int, dict[str, Any]]] = []
        self.triton: TritonUpdate | None = None


class _PreparedStep(PreparedStep):
    """The rounds of a step: one, unless a parameter is listed several times."""

    def __init__(
        self,
        layout: list[Any],
        params: list[Tensor],
        grads: list[Tensor | None],
        keys: list[str],
    ) -> None:
        super().__init__(layout, params, grads, keys)
        self.rounds: list[_Round] = []
        self.dense: list[int] = []  # indices of the parameters in the rounds' `native`

    def fits(
        self,
        layout: list[Any],
        params: list[Tensor],
        grads: list[Tensor | None],
        state: dict[Any, Any],
    ) -> bool:
        """Return whether nothing that this step relies on has changed since it was prepared."""
        return (
            super().fits(layout, params, grads, state)
            and all(params[i].is_contiguous() for i in self.dense)
            and all(g.is_contiguous() for i in self.dense if (g := grads[i]) is not None)
        )


class FusedAdamW(FusedOptimizer):
    """AdamW in one pass over parameters, gradients and moments.

    A drop-in for `torch.optim.AdamW`, with its arguments and their order.

    Args:
        params: parameters (fp32, bf16, fp16; fp64 on the CPU), or dicts of parameter groups.
        lr: learning rate, a float or a tensor of one element.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, multiplied by the learning rate.
        amsgrad: must be False.
        maximize: ascend instead of descend.
        foreach: ignored; torch's choice between implementations.
        capturable: ignored; this optimizer always is.
        differentiable: must be False.
        fused: ignored; this optimizer always is.
        state_dtype: dtype of the moments. None: the parameter's, and fp32 for fp16 parameters.
        master_weights: keep an fp32 copy of every bf16 and fp16 parameter and update that. Elements
            of a parameter that were changed since the last step (loaded, clamped, reset) are taken
            over into the copy.
        stochastic_rounding: round bf16 parameters and moments stochastically, so that updates
            smaller than half a unit in the last place survive on average.
        seed: of the stochastic rounding; the noise depends on it, the step and the position only.

    Raises:
        ValueError: a hyper-parameter is out of range, or an option is not supported.
        TypeError: a parameter's dtype is not supported.

    Numerics: fp32 arithmetic. ``state_dict`` and `torch.optim.AdamW`'s can be exchanged in both
        directions; moments load in this optimizer's ``state_dtype`` without a detour through the
        parameter's. State that was made before its parameter was cast keeps its dtype. Of a
        parameter listed several times, each occurrence is an update, one after the other.
    Memory: two moments a parameter, and 4 bytes an element with master weights.
    """

    _pickled = ("_state_dtype", "_master_weights", "_rounding", "_seed")
    _loadable = "FusedAdamW, torch.optim.AdamW or Adam"
    _group_keys = ("lr", "betas", "eps", "weight_decay")
    _state_keys = ("step", *_MOMENTS)
    _moments = _MOMENTS
    _optional = ("master",)
    # torch.amp.GradScaler then leaves unscaling and skipping to the step.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
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
        # The keys of torch.optim.AdamW's groups.
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults)

    def _adopt(self, group: dict[str, Any]) -> None:
        # True, because a torch.optim.AdamW that loads this state must keep its step counts on the
        # device. Together with foreach it would refuse.
        group["fused"] = True
        group["foreach"] = None
        if any(isinstance(beta, Tensor) for beta in group.get("betas", ())):
            group["betas"] = tuple(map(float, group["betas"]))

    def _accept(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        # Adam's state is AdamW's, as torch.optim.AdamW has it.
        groups = [{**group, "decoupled_weight_decay": True} for group in state_dict["param_groups"]]
        return super()._accept({**state_dict, "param_groups": groups})

    def _has_master(self, param: Tensor) -> bool:
        return self._master_weights and param.dtype in (torch.bfloat16, torch.float16)

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
        if self._has_master(param):
            state["master"] = param.detach().to(torch.float32, copy=True)
        return state

    def _prepare(
        self, layout: list[Any], params: list[Tensor], grads: list[Tensor | None]
    ) -> _PreparedStep:
        keys = [*self._state_keys, *(["master"] if self._master_weights else [])]
        prepared = _PreparedStep(layout, params, grads, keys)
        rounds: list[list[int]] = []  # a parameter's k-th occurrence is in the k-th round
        occurrences: Counter[Tensor] = Counter()
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            if grad is None:
                continue
            state = self._state_of(param, grad)
            if self._has_master(param) != ("master" in state):  # the parameter's dtype changed
                state.pop("master", None)
                if self._has_master(param):
                    state["master"] = param.detach().to(torch.float32, copy=True)
            if "master" in state:
                self._check_operand("master", state["master"], param)
            if occurrences[param] == len(rounds):
                rounds.append([])
            rounds[occurrences[param]].append(i)
            occurrences[param] += 1
        numbers = [n for n, group in enumerate(self.param_groups) for _ in group["params"]]
        for indices in rounds:
            self._prepare_round(prepared, indices, params, grads, numbers)
        return prepared

    def _prepare_round(
        self,
        prepared: _PreparedStep,
        indices: list[int],
        params: list[Tensor],
        grads: list[Tensor | None],
        group_numbers: list[int],
    ) -> None:
        one_round = _Round()
        sets: dict[tuple[torch.device, bool], list[int]] = {}
        for i in indices:
            local = local_tensor(params[i])
            triton = launches_triton(local) and not (local.is_cpu and local.dtype == torch.float64)
            sets.setdefault((local.device, triton), []).append(i)
        entries: list[tuple[int, dict[str, Any], int]] = []
        batches: dict[tuple[int, torch.dtype, torch.device], Any] = {}
        for (device, triton), members in sets.items():
            counts = [
                torch.as_tensor(self.state[params[i]]["step"], dtype=torch.float32, device=device)
                for i in members
            ]
            if prepared.rounds:  # the step counts are views of a vector already
                counters = counts
            else:
                counter = torch.stack([count.reshape(()) for count in counts])
                counts, counters = list(counter.unbind()), [counter]
            if not triton:
                one_round.counters += counters
            for i, step in zip(members, counts, strict=True):
                param, grad, state = params[i], grads[i], self.state[params[i]]
                state["step"] = step
                prepared.add(param, state)
                if triton:
                    entries.append((i, state, group_numbers[i]))
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
                    one_round.staged.append((group_numbers[i], i, state))
                    continue
                prepared.dense.append(i)
                key = (group_numbers[i], tensors[0].dtype, tensors[0].device)
                _, of_group, states = batches.setdefault(key, (group_numbers[i], [], []))
                of_group.append(i)
                states.append(state)
        one_round.native = list(batches.values())
        one_round.triton = TritonUpdate(entries) if entries else None
        prepared.rounds.append(one_round)

    @wrap_step
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
        params, grads, prepared = self._prepared_step()
        for one_round in prepared.rounds:
            self._update(one_round, params, grads, (clip_coefficient, grad_scale, found_inf))
        return loss

    def _update(
        self,
        one_round: _Round,
        params: list[Tensor],
        grads: list[Any],
        scalars: tuple[Tensor | None, Tensor | None, Tensor | None],
    ) -> None:
        groups = self.param_groups
        if one_round.triton is not None:
            seed = self._seed if self._rounding else None
            one_round.triton.launch(params, grads, groups, scalars, seed)
        clip_coefficient, grad_scale, found_inf = scalars
        if not one_round.counters or number_in(found_inf, 0.0) != 0:
            return
        scale = number_in(clip_coefficient, 1.0) / number_in(grad_scale, 1.0)
        for counter in one_round.counters:
            counter.add_(1)
        for number, indices, states in one_round.native:
            # Parameters that torch's fused kernel takes as they are: same group, same dtype.
            first, second, steps = ([s[key] for s in states] for key in (*_MOMENTS, "step"))
            ours, theirs = ([tensors[i] for i in indices] for tensors in (params, grads))
            if fits(ours, theirs, first, second):
                adamw(groups[number], scale, ours, theirs, first, second, steps)
                continue
            options, theirs = _arguments(groups[number]), _scaled(theirs, scale)
            torch._fused_adamw_(ours, theirs, first, second, [], steps, **options)
            torch.autograd.graph.increment_version(ours)
        for number, i, state in one_round.staged:
            seed = hash((self._seed, i, int(state["step"].item()))) if self._rounding else None
            update_staged(groups[number], params[i], grads[i], state, scale, seed)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for name, beta in zip(("beta1", "beta2"), group["betas"], strict=True):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"FusedAdamW: {name} must be in [0, 1), got {beta}")
        if not group["eps"] >= 0.0:
            raise ValueError(f"FusedAdamW: eps must be >= 0, got {group['eps']}")
        for option in ("amsgrad", "differentiable"):
            if group[option]:
                raise ValueError(
                    f"FusedAdamW: {option}=True is not supported; use torch.optim.AdamW"
                )
        if not group["decoupled_weight_decay"] and group["weight_decay"] != 0:
            raise ValueError(
                "FusedAdamW: weight decay is decoupled; use torch.optim.Adam to add it to gradients"
            )

    def _check_param(self, param: Tensor) -> None:
        if param.dtype not in _DTYPES:
            raise TypeError(
                f"FusedAdamW: parameters must be {[str(d) for d in _DTYPES]}, got {param.dtype}"
            )
