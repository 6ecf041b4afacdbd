"""Which parameters go to which optimizer, and their state by parameter name."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from fasttrain_kernels import FusedAdamW, Muon
from torch import Tensor, nn

from fasttrain.config import OptimConfig
from fasttrain.model import Transformer
from fasttrain.slices import cut

__all__ = ["build_optimizers", "load_optimizer_tensors", "optimizer_tensors"]


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """Return the optimizers of ``model``; each parameter is in exactly one group of one of them.

    Weight decay applies to matrices only: not to norms, biases and, unless ``decay_embeddings``,
    not to embeddings. With ``name = "muon"`` the matrices inside the blocks go to Muon and the
    rest to AdamW. Each group carries ``lr_scale``: the trainer sets its learning rate to the
    schedule's times that.
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
    options = {
        "matrices": (decay, 1.0),
        "head": (
            0.0 if head_is_table and not config.decay_embeddings else decay,
            config.head_lr_scale,
        ),
        "tables": (decay if config.decay_embeddings else 0.0, config.embedding_lr_scale),
        "vectors": (0.0, 1.0),
    }
    groups = [
        {"params": params, "weight_decay": options[k][0], "lr_scale": options[k][1]}
        for k, params in adamw.items()
        if params
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(FusedAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps))
    if hidden:
        muon_group = {"params": hidden, "weight_decay": decay, "lr_scale": config.muon_lr_scale}
        optimizers.append(
            Muon(
                [muon_group],
                lr=config.lr,
                momentum=config.muon_momentum,
                ns_steps=config.muon_ns_steps,
            )
        )
    return optimizers


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def optimizer_tensors(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """Return all optimizer state as ``<parameter name>/<key>`` → tensor, not copied."""
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {}
    for optimizer in optimizers:
        for index, state in optimizer.state_dict()["state"].items():
            p = list(_parameters(optimizer))[index]
            for key, value in state.items():
                tensors[f"{names[id(p)]}/{key}"] = torch.as_tensor(value)
    return tensors


def load_optimizer_tensors(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """Restore what `optimizer_tensors` returned, into optimizers built the same way.

    Args:
        model: whose parameters, sharded or not, the optimizers update.
        optimizers: of those parameters.
        tensors: whole ones; a sharded parameter takes its slices of them.

    Raises:
        KeyError: a tensor belongs to no parameter of these optimizers.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    unused = set(tensors)
    for optimizer in optimizers:
        state: dict[int, dict[str, Tensor]] = {}
        for index, p in enumerate(_parameters(optimizer)):
            prefix = f"{names[id(p)]}/"
            mine = {k[len(prefix) :]: cut(v, p) for k, v in tensors.items() if k.startswith(prefix)}
            unused -= {prefix + k for k in mine}
            if mine:
                state[index] = mine
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    if unused:
        raise KeyError(f"optimizer state for unknown parameters: {sorted(unused)[:3]}")
