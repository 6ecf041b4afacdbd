"""What the optimizers share: groups, state, loading, pickling, and a step prepared once.

A prepared step holds what depends only on the parameters, the gradients and the state. It serves
every step until one of these changes. The settings of a group are read from ``param_groups`` in
each step.
"""

import copy
import sys
from collections.abc import Callable
from functools import wraps
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._dispatch import use_triton
from ._torch import is_fake, is_step_observed

# With it `use_triton` says whether CPU tensors take the Triton path now.
_PROBE = torch.empty(0, dtype=torch.float32, device="cpu")
_UNTRACED = "the optimizer updates parameters in kernels of its own; compile the model alone"


def number_in(scalar: Tensor | None, default: float) -> float:
    """Return what a 0-dim tensor holds; ``default`` if there is none, or no memory behind it."""
    if scalar is None or scalar.is_meta or is_fake(scalar):
        return default
    return scalar.item()


class PreparedStep:
    """What depends only on the parameters, on which have gradients, and on where state lies."""

    def __init__(
        self, layout: list[Any], params: list[Tensor], grads: list[Tensor | None], keys: list[str]
    ) -> None:
        self.layout, self.params, self.keys = layout, params, keys
        self.described = _describe(params, grads)
        self.on_triton = use_triton(_PROBE)
        self.active: list[Tensor] = []  # those with a gradient
        self.states: list[dict[str, Any]] = []
        self.kept: list[Any] = []  # what the states hold under `keys`

    def add(self, param: Tensor, state: dict[str, Any]) -> None:
        """Take a parameter that has a gradient."""
        self.active.append(param)
        self.states.append(state)
        self.kept += map(state.get, self.keys)

    def fits(
        self,
        layout: list[Any],
        params: list[Tensor],
        grads: list[Tensor | None],
        state: dict[Any, Any],
    ) -> bool:
        """Return whether nothing that this step relies on has changed since it was prepared."""
        return (
            self.layout == layout
            and all(map(is_, params, self.params))
            and self.described == _describe(params, grads)
            and self.on_triton == use_triton(_PROBE)
            and all(map(is_, map(state.get, self.active), self.states))
            and all(map(is_, [s.get(key) for s in self.states for key in self.keys], self.kept))
        )


def _describe(params: list[Tensor], grads: list[Tensor | None]) -> tuple[list[Any], list[Any]]:
    """Return what a parameter or gradient that is the same object may have changed nevertheless.

    ``module.to(dtype)`` and ``p.data = x`` exchange what is behind a parameter.
    """
    return (
        [(p.dtype, p.device, p.shape) for p in params],
        [None if g is None else (g.dtype, g.layout) for g in grads],
    )


def wrap_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an optimizer's step for hooks and profiler, where there are any, and for compilers.

    Torch's own way asks for them slowly, in each step. A compiled function calls the step as it is,
    outside its graphs.
    """
    step = torch.no_grad()(step)
    hooked = Optimizer.profile_hook_step(step)
    untraced: list[Callable[..., Any]] = []  # made when first called beside a compiler

    def run(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        # A subclass's own step is wrapped by torch.
        watched = type(self).step is run_untraced and is_step_observed(self)
        return (hooked if watched else step)(self, *args, **kwargs)

    @wraps(step)
    def run_untraced(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if not (torch.compiler.is_compiling() or "torch._dynamo" in sys.modules):
            return run(self, *args, **kwargs)
        if not untraced:
            untraced.append(torch.compiler.disable(run, reason=_UNTRACED))
        return untraced[0](self, *args, **kwargs)

    run_untraced.hooked = True  # type: ignore[attr-defined]  # torch need not wrap it again
    return run_untraced


class FusedOptimizer(Optimizer):
    """An optimizer that prepares its step once, and again when what was prepared no longer fits."""

    reads_clip_on_device = True  # `step` takes clip_coefficient and found_inf
    _prepared: Any = None
    _pickled: tuple[str, ...] = ()  # attributes beside torch's
    _loadable = ""  # the optimizers whose state it loads
    _group_keys: tuple[str, ...] = ()  # what each of this kind's saved groups has
    _state_keys: tuple[str, ...] = ()  # and each parameter's state
    _moments: tuple[str, ...] = ()  # those of the state that are shaped like the parameter
    _optional: tuple[str, ...] = ()  # what a state has only if this optimizer's options ask for it

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its hyper-parameters override the defaults."""
        if isinstance(param_group, dict):  # else torch refuses it
            self._adopt(param_group)
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
            for param in self.param_groups[-1]["params"]:
                self._check_param(param)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepared = None
        for group in self.param_groups:
            self._adopt(group)
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            self._check_group(group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in self._pickled}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this optimizer's state, or that of torch's optimizer of the same kind.

        Args:
            state_dict: as ``state_dict()`` returns it. Its tensors are copied.

        Raises:
            ValueError: it is another optimizer's state, or one of other parameters. Nothing is
                changed then.
        """
        accepted: list[dict[str, Any]] = []

        def accept(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            accepted.append(self._accept(given))
            return accepted[0]

        # The last before torch loads, and the first after it: hooks of others see what is right.
        hooks = [
            self.register_load_state_dict_pre_hook(accept),
            self.register_load_state_dict_post_hook(
                lambda _: self._copy_state(accepted[0]), prepend=True
            ),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _accept(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a saved state with all settings of this optimizer, or raise if it is another's."""
        name = type(self).__name__
        groups = []
        for number, saved in enumerate(state_dict["param_groups"]):
            if missing := [key for key in self._group_keys if key not in saved]:
                raise ValueError(
                    f"{name}.load_state_dict: group {number} lacks {', '.join(missing)}: another "
                    f"optimizer's state; load one of {self._loadable}"
                )
            group = dict(saved)
            self._adopt(group)
            groups.append({**self.defaults, **group})
            self._check_group(groups[-1])
        ids, params = _parameters(groups), _parameters(self.param_groups)
        for index, param in zip(ids, params, strict=False):  # torch compares their numbers
            saved = state_dict["state"].get(index)
            if not saved:
                continue
            if missing := [key for key in self._state_keys if key not in saved]:
                raise ValueError(
                    f"{name}.load_state_dict: the state of parameter {index} lacks "
                    f"{', '.join(missing)} and holds {', '.join(map(str, saved))}: another "
                    f"optimizer's state; load one of {self._loadable}"
                )
            for key in self._moments:
                shape = tuple(getattr(saved[key], "shape", ()))
                if shape != tuple(param.shape):
                    raise ValueError(
                        f"{name}.load_state_dict: {key} of parameter {index} has shape {shape}, "
                        f"the parameter {tuple(param.shape)}; pass the parameters in the order in "
                        "which they were when it was saved"
                    )
        return {**state_dict, "param_groups": groups}

    def _copy_state(self, source: dict[str, Any]) -> None:
        """Take the state again from its source, as torch casts it to the parameters' dtypes.

        Where nothing is to be cast, torch takes the very tensors of the source.
        """
        ids, params = _parameters(source["param_groups"]), _parameters(self.param_groups)
        for index, param in zip(ids, params, strict=True):
            saved = source["state"].get(index)
            if not saved:
                continue
            made = self.new_state(param)
            for key, value in self.state[param].items():
                if key not in made:
                    if key not in self._optional:
                        made[key] = copy.deepcopy(value)
                elif isinstance(saved[key], Tensor):
                    made[key].copy_(saved[key])
                else:
                    made[key].fill_(saved[key])
            self.state[param] = made

    def new_state(self, param: Tensor) -> dict[str, Any]:
        """Return the state that the first step makes for a parameter, which may be on meta."""
        raise NotImplementedError

    def _adopt(self, group: dict[str, Any]) -> None:
        """Turn torch's spellings of a group's settings into this optimizer's, in place."""

    def _check_group(self, group: dict[str, Any]) -> None:
        name, lr = type(self).__name__, group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"{name}: a tensor lr must have one element, got {lr.numel()}")
        if not lr >= 0.0:
            raise ValueError(f"{name}: lr must be >= 0, got {lr}")
        if not group["weight_decay"] >= 0.0:
            raise ValueError(f"{name}: weight_decay must be >= 0, got {group['weight_decay']}")

    def _check_param(self, param: Tensor) -> None:
        raise NotImplementedError

    def _layout(self) -> list[Any]:
        """Return what a prepared step takes from the groups."""
        return [len(group["params"]) for group in self.param_groups]

    def _prepared_step(self) -> tuple[list[Tensor], list[Tensor | None], Any]:
        """Return all parameters, their gradients and the prepared step."""
        layout, params = self._layout(), _parameters(self.param_groups)
        grads = [p.grad for p in params]
        if self._prepared is None or not self._prepared.fits(layout, params, grads, self.state):
            self._prepared = None
            self._prepared = self._prepare(layout, params, grads)
        return params, grads, self._prepared

    def _prepare(
        self, layout: list[Any], params: list[Tensor], grads: list[Tensor | None]
    ) -> PreparedStep:
        raise NotImplementedError

    def _state_of(self, param: Tensor, grad: Tensor) -> dict[str, Any]:
        """Return a parameter's state, made where there is none, that a step can be made with."""
        name = type(self).__name__
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"{name}: gradients must be dense, got {grad.layout}; use "
                "torch.optim.SparseAdam for sparse ones"
            )
        self._check_operand("gradient", grad, param)
        state: dict[str, Any] = self.state[param]
        if not any(key in state for key in self._state_keys):
            state |= self.new_state(param)
        if missing := [key for key in self._state_keys if key not in state]:
            raise RuntimeError(
                f"{name}: the state of a parameter lacks {', '.join(missing)}, it holds "
                f"{', '.join(map(str, state))}; delete it or load a whole one"
            )
        for key in self._moments:
            self._check_operand(key, state[key], param)
        return state

    def _check_operand(self, what: str, tensor: Tensor, param: Tensor) -> None:
        if tensor.shape != param.shape or tensor.device != param.device:
            raise RuntimeError(
                f"{type(self).__name__}: {what} has shape {tuple(tensor.shape)} on "
                f"{tensor.device}, its parameter {tuple(param.shape)} on {param.device}; where a "
                "parameter was moved, zero_grad() drops its gradient and "
                "load_state_dict(state_dict()) moves its state"
            )


def _parameters(groups: list[dict[str, Any]]) -> list[Any]:
    return [param for group in groups for param in group["params"]]
