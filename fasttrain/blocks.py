"""How the blocks of a model are run while it trains: compiled, and what they keep for backward.

With activation checkpointing a block keeps its input alone, or with ``selective`` what is dear to
compute as well, and its backward pass computes the rest again: the same numbers, by the same
operations. Source: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost
(arXiv:1604.06174).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fasttrain.block_cpu import build, run_blocks_on_cpu
from fasttrain.config_keys import refuse
from fasttrain.device import compile_function, compiles_evaluation
from fasttrain.model import Block, Transformer, run_block, run_blocks

__all__ = ["prepare_blocks"]

_Runner = Callable[..., Tensor]


def _dear() -> list[Any]:
    """Return the operations whose results ``selective`` keeps: matrix products and attention."""
    names = (
        *("mm", "addmm", "bmm"),
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    ours = torch.ops.fasttrain.causal_attention_forward.default
    return [ours, *(getattr(torch.ops.aten, name).default for name in names)]


def _forward(block: nn.Module, x: Tensor, *rest: Any) -> Tensor:
    return Block.forward(block, x, *rest)  # type: ignore[arg-type]


def _checkpointed(kind: str, run: _Runner) -> _Runner:
    if kind == "none":
        return run
    options: dict[str, Any] = {"use_reentrant": False}
    if kind not in ("full", "selective"):
        refuse("train.activation_checkpointing", kind, "is not implemented; add it to blocks.py")
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _dear())

    def run_checkpointed(block: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        y: Tensor = checkpoint(run, block, x, *rest, **options)
        return y

    return run_checkpointed


def prepare_blocks(
    model: Transformer, *, activation_checkpointing: str, mode: str, sharded: bool
) -> None:
    """Set how the blocks of ``model`` are run in training; on CUDA in evaluation, if compiled.

    Args:
        model: as it will train; sharded already where it is.
        activation_checkpointing: ``train.activation_checkpointing``.
        mode: ``blocks`` compiles one block for all, ``c++`` has `fasttrain.block_cpu` run them.
        sharded: the parameters of a block are gathered when it is called as a module: what is
            compiled and what is computed again lie inside of that.
    """
    run = _checkpointed(activation_checkpointing, _forward if sharded else run_block)
    if mode == "blocks":
        run = compile_function(run, "default")
    run_all: _Runner = partial(run_blocks, run=run)
    if mode == "c++":
        build()
        run_all = run_blocks_on_cpu
    compiled = mode == "blocks"
    if not sharded:
        model.blocks_fn = partial(_run, run_all, compiled)
        return
    for block in model.blocks:
        block.forward = partial(_run_inside, run_all, compiled, block)


def _is_own(compiled: bool, x: Tensor, cache: object) -> bool:
    """Return whether blocks run here as in training: with gradients, or compiled to evaluate."""
    evaluates = compiled and compiles_evaluation(x.device)
    return cache is None and (evaluates or torch.is_grad_enabled())


def _run(
    run_all: _Runner, compiled: bool, blocks: Any, norm: Any, x: Tensor, rope: Any, mask: Any,
    caches: Any, *rest: Any,
) -> Tensor:  # fmt: skip
    run = run_all if _is_own(compiled, x, caches) else run_blocks
    return run(blocks, norm, x, rope, mask, caches, *rest)


def _run_inside(
    run_all: _Runner, compiled: bool, block: nn.Module, x: Tensor, rope: Any, mask: Any,
    cache: Any, start: int, value: Tensor | None,
) -> Tensor:  # fmt: skip
    if not _is_own(compiled, x, cache):
        return _forward(block, x, rope, mask, cache, start, value)
    return run_all([block], None, x, rope, mask, None, start, None if value is None else [value])
