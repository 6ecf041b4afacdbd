"""Which parameters go to which optimizer, and their state by parameter name."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fasttrain_kernels import FusedAdamW, Muon
from torch import Tensor, nn

from fasttrain.config import OptimConfig, UserError
from fasttrain.config.keys import refuse
from fasttrain.distributed.slices import cut
from fasttrain.model.transformer import Transformer

__all__ = [
    "build_optimizers", "load_optimizer_tensors", "optimizer_tensors", "set_lr", "state_bytes",
]  # fmt: skip


def build_optimizers(
    model: nn.Module, config: OptimConfig, compute: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """Return the optimizers of ``model``; each parameter is in exactly one group of one of them.

    Weight decay applies to matrices only: not to norms, biases and, unless ``decay_embeddings``,
    not to embeddings. With ``name = "muon"`` the matrices inside the blocks go to Muon and the
    rest to AdamW; the other names take all of them. Each group carries ``lr_scale``: the trainer
    sets its learning rate to the schedule's times that.

    Args:
        model: a model whose parameters are to be trained.
        config: the ``[optim]`` section.
        compute: dtype of the run's matrix products. Muon's are in bf16 where it is that, else in
            fp32: fp16 has too few exponent bits for them.

    Raises:
        UserError: the optimizer's package is not installed.

    Source: SGD, Adafactor (Shazeer & Stern 2018, arXiv:1804.04235): torch.optim; 8-bit moments
    (Dettmers et al. 2021, arXiv:2110.02861): torchao.
    """
    table_ids: set[int] = set()  # look-up tables; a tied head is one of them
    head_id: int | None = None
    if isinstance(model, Transformer):
        head_id = id(model.head_weight)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            table_ids.update(id(p) for p in module.parameters())
    hidden: list[Tensor] = []
    adamw: dict[str, list[Tensor]] = {"matrices": [], "tables": [], "head": [], "vectors": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if id(p) == head_id:
            adamw["head"].append(p)
        elif id(p) in table_ids:
            adamw["tables"].append(p)
        elif p.ndim < 2:
            adamw["vectors"].append(p)
        elif config.name == "muon" and p.ndim == 2 and "blocks." in name:
            hidden.append(p)
        else:
            adamw["matrices"].append(p)
    decay = config.weight_decay
    head_is_table = head_id in table_ids
    table_scale = head_scale = 1.0
    if config.name == "muon":
        table_scale, head_scale = config.muon_embedding_lr_scale, config.muon_head_lr_scale
    options = {
        "matrices": (decay, 1.0),
        "head": (0.0 if head_is_table and not config.decay_embeddings else decay, head_scale),
        "tables": (decay if config.decay_embeddings else 0.0, table_scale),
        "vectors": (0.0, 1.0),
    }
    groups = [
        {"params": params, "weight_decay": options[k][0], "lr_scale": options[k][1]}
        for k, params in adamw.items()
        if params
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(_optimizer(groups, config))
    if hidden:
        group = {"params": hidden, "weight_decay": decay, "lr_scale": 1.0}
        optimizers.append(
            Muon(
                [group],
                lr=config.peak_lr,
                momentum=config.muon_momentum,
                ns_steps=config.muon_ns_steps,
                ns_dtype=torch.bfloat16 if compute is torch.bfloat16 else torch.float32,
            )
        )
    return optimizers


def _optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer of ``[optim]`` for all but what Muon takes."""
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
        eight_bit: torch.optim.Optimizer = made(groups, lr=lr, betas=config.betas, eps=config.eps)
        return eight_bit
    if config.name in ("adamw", "muon"):
        return FusedAdamW(groups, lr=lr, betas=config.betas, eps=config.eps)
    refuse("optim.name", config.name, "is not implemented; add it to engine/optim.py")


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group to ``lr`` times its ``lr_scale``."""
    for group in optimizer.param_groups:
        value = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):  # compiled optimizers know it by its address
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the moments that `build_optimizers`' ``optimizer`` will hold."""
    total = 0
    for p in _parameters(optimizer):
        if isinstance(optimizer, Muon):
            total += p.nbytes
        elif isinstance(optimizer, torch.optim.SGD):
            total += p.nbytes if optimizer.defaults["momentum"] else 0
        elif isinstance(optimizer, torch.optim.Adafactor):  # of a matrix its row and column means
            total += (sum(p.shape) if p.ndim > 1 else p.numel()) * p.element_size()
        elif isinstance(optimizer, FusedAdamW) or p.numel() < 4096 or p.numel() % 256:
            total += 2 * p.nbytes
        else:  # torchao: two moments of a byte, an fp32 scale for each 256 of them and two tables
            total += 2 * (p.numel() + p.numel() // 64 + 1024)
    return total


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _parts(tensor: Tensor) -> list[str]:
    """Return the names of the plain tensors that a quantized one is made of; none of another."""
    if type(tensor).__module__.startswith("torchao."):
        names: list[str] = tensor.__tensor_flatten__()[0]  # type: ignore[attr-defined]
        return names
    return []


def optimizer_tensors(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """Return all optimizer state as ``<parameter name>/<key>`` → tensor, not copied.

    Of a quantized tensor its parts, as ``<parameter name>/<key>/<part>``. What an optimizer has
    not made yet (None) is left out.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {}
    for optimizer in optimizers:
        parameters = _parameters(optimizer)
        for index, state in optimizer.state_dict()["state"].items():
            name = names[id(parameters[index])]
            for key, value in state.items():
                if value is None:
                    continue
                whole = torch.as_tensor(value)
                parts = {f"/{part}": getattr(whole, part) for part in _parts(whole)}
                for part, tensor in (parts or {"": whole}).items():
                    tensors[f"{name}/{key}{part}"] = tensor
    return tensors


def load_optimizer_tensors(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    tensors: Mapping[str, Tensor],
    *,
    stepped: bool = False,
) -> None:
    """Restore what `optimizer_tensors` returned, into optimizers built the same way.

    Args:
        model: whose parameters, sharded or not, the optimizers update.
        optimizers: of those parameters.
        tensors: whole ones; a sharded parameter takes its slices of them.
        stepped: whether each parameter must have some, for a step was made of all of them.

    Raises:
        KeyError: a tensor belongs to no parameter of these optimizers.
        RuntimeError: one is missing, or has another shape or type than the optimizer gives it.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    of: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        name, _, key = full.partition("/")
        of.setdefault(name, {})[key] = tensor
    for optimizer in optimizers:
        state: dict[int, dict[str, Tensor]] = {}
        for index, p in enumerate(_parameters(optimizer)):
            mine = of.pop(names[id(p)], {})
            if mine or stepped:
                _check(optimizer, p, names[id(p)], mine)
            if mine:
                slices = {key: cut(tensor, p) for key, tensor in mine.items()}
                state[index] = _whole(optimizer, p, slices)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    if of:
        raise KeyError(f"optimizer state for unknown parameters: {sorted(of)[:3]}")


def _check(
    optimizer: torch.optim.Optimizer, p: Tensor, name: str, saved: Mapping[str, Tensor]
) -> None:
    """Refuse state of a parameter that is not what a step of the optimizer would have made."""
    expected = _expected(optimizer, p)
    if expected is None:  # of an optimizer that makes what it likes, but something
        expected = dict(saved) or {"state": p}
    for key in sorted(expected.keys() | saved.keys()):
        there, here = (
            f"{tuple(t[key].shape)} {t[key].dtype}" if key in t else "missing"
            for t in (saved, expected)
        )
        if there != here:
            raise RuntimeError(f"optimizer state {name}/{key} is {there} there and {here} here")


def _expected(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor] | None:
    """Return the state that a step makes for a parameter, without values; None: not known."""
    like = torch.empty(p.shape, dtype=p.dtype, device="meta")
    step = torch.empty((), device="meta")
    if isinstance(optimizer, FusedAdamW):
        return optimizer._new_state(like)
    if isinstance(optimizer, Muon):
        return {"momentum_buffer": like}
    if type(optimizer) is torch.optim.SGD:
        return {"momentum_buffer": like} if optimizer.defaults["momentum"] else {}
    if type(optimizer) is torch.optim.Adafactor:
        if p.ndim < 2:
            return {"step": step, "variance": like}
        return {"step": step, "row_var": like[..., :1], "col_var": like[..., :1, :]}
    return None


def _whole(
    optimizer: torch.optim.Optimizer, p: Tensor, saved: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the state of one parameter, quantized tensors put together from their parts."""
    state = {key: tensor for key, tensor in saved.items() if "/" not in key}
    for key in sorted({key.partition("/")[0] for key in saved if "/" in key}):
        # torchao's optimizers make their buffers so at the first step; only the first is signed.
        new: Any = getattr(optimizer, "_new_buffer", None)
        buffer = new and new(p, signed=key == "exp_avg")
        if buffer is None or not _parts(buffer):
            raise KeyError(f"quantized optimizer state {key!r}, for which this optimizer has none")
        for part in _parts(buffer):
            old, new_part = saved[f"{key}/{part}"], getattr(buffer, part)
            if (old.shape, old.dtype) != (new_part.shape, new_part.dtype):
                raise RuntimeError(f"optimizer state {key}/{part} has another shape or type")
            new_part.copy_(old)
        state[key] = buffer
    return state
