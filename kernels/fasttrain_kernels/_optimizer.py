"""What the optimizers share: checks of groups, pickling, and a plan kept from step to step."""

from operator import is_
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class Plan:
    """What depends only on which parameters have gradients, and on where their state lies."""

    def __init__(self, params: list[Tensor], grads: list[Tensor | None], key: str) -> None:
        self.params, self.key = params, key
        self.has_grad = [grad is not None for grad in grads]
        self.active: list[Tensor] = []  # those with a gradient, their states, and `key` of these
        self.states: list[dict[str, Any]] = []
        self.kept: list[Tensor] = []

    def add(self, param: Tensor, state: dict[str, Any]) -> None:
        """Take a parameter that has a gradient."""
        self.active.append(param)
        self.states.append(state)
        self.kept.append(state[self.key])

    def fits(self, params: list[Tensor], grads: list[Tensor | None], state: dict[Any, Any]) -> bool:
        """Return whether nothing that the plan relies on has changed since it was made."""
        return (
            self.has_grad == [grad is not None for grad in grads]
            and all(map(is_, params, self.params))
            and all(map(is_, map(state.get, self.active), self.states))
            and all(map(is_, [s.get(self.key) for s in self.states], self.kept))
        )


class PlannedOptimizer(Optimizer):
    """An optimizer whose step follows the plan of `_build_plan`, made anew when it fits no more."""

    reads_clip_on_device = True  # `step` takes clip_coefficient and found_inf
    _plan: Any = None
    _pickled: tuple[str, ...] = ()  # attributes beside torch's

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its hyper-parameters override the defaults."""
        super().add_param_group(param_group)
        self._plan = None
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            self._check_group(group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in self._pickled}}

    def _check_group(self, group: dict[str, Any]) -> None:
        name, lr = type(self).__name__, group["lr"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1:
                raise ValueError(f"{name}: a tensor lr must have one element, got {lr.numel()}")
        elif not lr >= 0.0:
            raise ValueError(f"{name}: lr must be >= 0, got {lr}")
        if not group["weight_decay"] >= 0.0:
            raise ValueError(f"{name}: weight_decay must be >= 0, got {group['weight_decay']}")

    def _planned(self) -> tuple[list[Tensor], list[Any], Any]:
        """Return all parameters, their gradients and the plan of this step."""
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        if self._plan is None or not self._plan.fits(params, grads, self.state):
            self._plan = self._build_plan(params, grads)
        return params, grads, self._plan

    def _build_plan(self, params: list[Tensor], grads: list[Tensor | None]) -> Plan:
        raise NotImplementedError
