"""Which parameters go to which optimizer, and their state by parameter name."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from fasttrain_kernels import FusedAdamW, Muon
from torch import Tensor, nn
from torch.optim import Optimizer

from fasttrain.config import OptimConfig, UserError, refuse
from fasttrain.distributed.sharding import cut
from fasttrain.model.transformer import Transformer


def build_optimizers(
    model: nn.Module, config: OptimConfig, compute: torch.dtype = torch.float32
) -> list[Optimizer]:
    """Return the optimizers of ``model``; each parameter is in exactly one group of one of them.

    Weight decay applies to matrices only: not to norms, biases and, unless ``decay_embeddings``,
    not to embeddings. With ``name = "muon"`` the matrices inside the blocks go to Muon and the rest
    to AdamW. The trainer sets a group's learning rate to the schedule's times its ``lr_scale``.
    ``compute`` is the dtype of the run's matrix products: Muon's are in half precision where it is
    bf16, in fp16 on a GPU (see `newton_schulz`), else in fp32.

    Source: SGD, Adafactor (Shazeer & Stern 2018, arXiv:1804.04235): torch.optim; 8-bit moments
    (Dettmers et al. 2021, arXiv:2110.02861): torchao.
    """
    modules, is_muon = model.modules(), config.name == "muon"
    tables = {id(p) for m in modules if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = id(model.head_weight) if isinstance(model, Transformer) else None  # a table where tied
    decay, table_decay = config.weight_decay, config.weight_decay * config.decay_embeddings
    groups: dict[str, dict[str, Any]] = {
        kind: {"params": [], "weight_decay": own_decay, "lr_scale": scale if is_muon else 1.0}
        for kind, own_decay, scale in (
            ("matrices", decay, 1.0),
            ("tables", table_decay, config.muon_embedding_lr_scale),
            ("head", table_decay if head in tables else decay, config.muon_head_lr_scale),
            ("vectors", 0.0, 1.0),
            ("hidden", decay, 1.0),
        )
    }
    for name, p in model.named_parameters():
        if id(p) == head:
            kind = "head"
        elif id(p) in tables:
            kind = "tables"
        elif p.ndim < 2:
            kind = "vectors"
        else:
            kind = "hidden" if is_muon and p.ndim == 2 and "blocks." in name else "matrices"
        if p.requires_grad:
            groups[kind]["params"].append(p)
    groups = {kind: group for kind, group in groups.items() if group["params"]}
    hidden = groups.pop("hidden", None)
    optimizers = [_optimizer([*groups.values()], config)] if groups else []
    if hidden is not None:
        lr, momentum, ns_steps = config.peak_lr, config.muon_momentum, config.muon_ns_steps
        dtype = None if compute is torch.bfloat16 else torch.float32
        muon = Muon([hidden], lr=lr, momentum=momentum, ns_steps=ns_steps, ns_dtype=dtype)
        optimizers.append(muon)
    return optimizers


def _optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    """Return the optimizer of all parameters that Muon does not take."""
    lr = config.peak_lr
    if config.name == "sgd":
        # SGD adds the decay to the gradient; dampening 0 is torch's default and Nesterov's need.
        return torch.optim.SGD(
            groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, foreach=True
        )
    if config.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=lr, foreach=True)
    if config.name == "adamw8bit":
        try:
            made = importlib.import_module("torchao.optim").AdamW8bit
        except ImportError as error:
            raise UserError(
                f"optim.name = 'adamw8bit' needs torchao ({error}); install it with pip install "
                "torchao, or use optim.name=adamw"
            ) from error
        return cast(Optimizer, made(groups, lr=lr, betas=config.betas, eps=config.eps))
    if config.name in ("adamw", "muon"):
        return FusedAdamW(groups, lr=lr, betas=config.betas, eps=config.eps)
    refuse("optim.name", config.name, "is not implemented; add it to engine/optim.py")


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group to ``lr`` times its ``lr_scale``."""
    for group in optimizer.param_groups:
        value = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):  # compiled optimizers know it by its address
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def plain_name(name: str) -> str:
    """Return a parameter's name without what `torch.compile` of a part of the model adds to it."""
    return name.replace("_orig_mod.", "")


def parameters_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters by the names that a checkpoint has for them."""
    return {plain_name(name): p for name, p in model.named_parameters()}


def state_by_name(model: nn.Module) -> dict[str, Any]:
    """Return ``model.state_dict()`` by the names that a checkpoint has for its entries."""
    return {plain_name(name): value for name, value in model.state_dict().items()}


def load_by_name(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load what `state_by_name` returned, whichever parts of the model are compiled."""
    own = {plain_name(name): name for name in model.state_dict()}
    model.load_state_dict({own.get(name, name): value for name, value in state.items()})


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of an optimizer, in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _new_state(optimizer: Optimizer, p: Tensor, device: Any = "meta") -> dict[str, Tensor] | None:
    """Return the state that a step makes for a parameter; None: not known."""
    like = torch.empty(p.shape, dtype=p.dtype, device=device)
    # As torch's optimizers count, whatever the default dtype is.
    is_double = torch.get_default_dtype() == torch.float64
    step = torch.zeros((), dtype=torch.float64 if is_double else torch.float32, device=device)
    if isinstance(optimizer, FusedAdamW | Muon):
        return optimizer.new_state(like)
    if type(optimizer) is torch.optim.SGD:
        return {"momentum_buffer": like} if optimizer.defaults["momentum"] else {}
    if type(optimizer) is torch.optim.Adafactor:
        if p.ndim < 2:
            return {"step": step, "variance": like}
        return {"step": step, "row_var": like[..., :1], "col_var": like[..., :1, :]}
    if (make := getattr(optimizer, "_new_buffer", None)) and not hasattr(p, "placements"):
        # As torchao's optimizers make them; only the first is signed.
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 2 + optimizer.defaults["amsgrad"]]
        return {"step": step, **{name: make(like, signed=name == "exp_avg") for name in names}}
    return None


def _tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a parameter's state; a quantized one in parts, as ``<key>/<part>``."""
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor | bool | int | float):  # None is not made yet
            whole: Any = value
            if not isinstance(value, Tensor):
                whole = torch.as_tensor(value, device="cpu")
            quantized = type(whole).__module__.startswith("torchao.")
            parts = whole.__tensor_flatten__()[0] if quantized else ()
            tensors |= {f"{key}/{part}": getattr(whole, part) for part in parts} or {key: whole}
    return tensors


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of the moments that `build_optimizers`' ``optimizer`` will hold."""
    total = 0
    for p in parameters_of(optimizer):
        state = _new_state(optimizer, p)
        moments = {"first": p, "second": p} if state is None else _tensors_of(state)
        total += sum(tensor.nbytes for key, tensor in moments.items() if key != "step")
    return total


def optimizer_tensors(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Return all optimizer state as ``<parameter name>/<key>`` → tensor, not copied.

    A quantized tensor is returned in parts, as ``<parameter name>/<key>/<part>``.
    """
    names = {id(p): name for name, p in parameters_by_name(model).items()}
    return {
        f"{names[id(p)]}/{key}": tensor
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for key, tensor in _tensors_of(state).items()
    }


def load_optimizer_tensors(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    tensors: Mapping[str, Tensor],
    *,
    stepped: bool = False,
) -> None:
    """Restore what `optimizer_tensors` returned, into optimizers built the same way.

    The tensors are whole ones, of which a sharded parameter takes its slices. With ``stepped``
    every parameter must have some, as a step was made with all of them. Raises KeyError or
    RuntimeError where they are not those that these optimizers make.
    """
    names = {id(p): name for name, p in parameters_by_name(model).items()}
    of: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        name, _, key = full.partition("/")
        of.setdefault(name, {})[key] = tensor
    for optimizer in optimizers:
        state: dict[int, dict[str, Tensor]] = {}
        for index, p in enumerate(parameters_of(optimizer)):
            mine = of.pop(names[id(p)], {})
            if not (mine or stepped):
                continue
            whole = {key: tensor for key, tensor in mine.items() if "/" not in key}
            parts = mine.keys() - whole.keys()  # of quantized tensors
            new = _new_state(optimizer, p, p.device if parts else "meta")
            # Where it is not known, it still cannot be empty, nor in parts.
            expected = whole or {"state": p} if new is None else _tensors_of(new)
            check_tensors(f"optimizer state {names[id(p)]}/", mine, expected)
            for part in parts:
                expected[part].copy_(mine[part])  # into a tensor of `new`
            if new and parts:
                whole = new | whole
            if whole:
                state[index] = {key: cut(tensor, p) for key, tensor in whole.items()}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        for index, mine in state.items():  # torch has made all floats the parameter's dtype
            held = optimizer.state[parameters_of(optimizer)[index]]
            held |= {k: t.to(held[k].device) for k, t in mine.items() if t.dtype != held[k].dtype}
    if of:
        raise KeyError(f"optimizer state for unknown parameters: {sorted(of)[:3]}")


def check_tensors(what: str, saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError where tensors are not of the names, shapes and types that are wanted."""
    for name in sorted(saved.keys() | wanted.keys()):
        found = (saved.get(name), wanted.get(name))
        there, here = ("missing" if t is None else f"{tuple(t.shape)} {t.dtype}" for t in found)
        if there != here:
            raise RuntimeError(f"{what}{name} is {there} there and {here} here")
