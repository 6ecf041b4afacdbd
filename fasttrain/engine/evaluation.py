"""The held-out split: loss, perplexity, bits per byte and next-token accuracy."""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from fasttrain.config import TrainConfig
from fasttrain.data.dataset import TokenDataset
from fasttrain.data.loader import IGNORE_INDEX, evaluation_batches
from fasttrain.data.order import LoaderOptions
from fasttrain.device import Precision
from fasttrain.distributed.sharding import evaluating
from fasttrain.engine.step import TrainStep, summed_loss
from fasttrain.model.runtime import compile_function, compiles_evaluation
from fasttrain.model.transformer import Transformer


@torch.no_grad()
def evaluate(
    step: TrainStep,
    dataset: TokenDataset,
    config: TrainConfig,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Run the model over the split, or ``eval.tokens`` of it; no token is a target twice.

    Rows are those of training (see `evaluation_batches`): where they are documents, the first token
    of each document is no target. On CUDA the model is compiled where training compiles one graph.
    The ranks share the batches and all return the same.

    Returns ``val_loss`` in nats a token, ``val_ppl``, ``val_bpb`` in bits a UTF-8 byte of the text
    (None where the dataset does not know its bytes; of a part of the split, by the mean bytes of a
    token) and ``val_accuracy`` of the next token; nothing where ``should_stop``, asked before each
    batch, on which ranks agree, said yes.
    """
    model, device, world = cast(Transformer, step.model), step.loss.device, step.world
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    seq_len, fraction = config.data.seq_len, config.eval.stride_fraction
    stride = None if fraction is None else max(round(fraction * seq_len), 1)
    rows = config.eval.batch_size or config.train.micro_batch
    options = LoaderOptions.of(
        config, micro_batch=rows, rank=world.rank, world_size=world.size, stride_tokens=stride
    )
    batches = evaluation_batches(dataset, options, device, n_tokens=config.eval.tokens)
    one_graph = step.compile_mode not in ("off", "c++", "blocks") and compiles_evaluation(device)
    totals_of = _compiled(_totals, "default") if one_graph else _totals
    with evaluating(model, world):
        for batch in batches:
            if should_stop is not None and should_stop():
                return {}
            inputs = (batch.tokens, batch.targets, batch.doc_starts)
            totals += totals_of(model, *inputs, step.precision)
    loss_sum, n_right, n_targets = world.sum(totals).tolist()
    loss = loss_sum / n_targets
    n_bytes = dataset.n_bytes
    if n_bytes and config.eval.tokens is not None:
        n_bytes = n_bytes * n_targets / dataset.n_tokens
    return {
        "val_loss": loss,
        "val_ppl": math.exp(min(loss, 700.0)),
        "val_bpb": loss_sum / math.log(2) / n_bytes if n_bytes else None,
        "val_accuracy": n_right / n_targets,
    }


_compiled = functools.cache(compile_function)  # for one evaluation; it serves the next


def _totals(
    model: Transformer, tokens: Tensor, targets: Tensor, starts: Tensor | None, precision: Precision
) -> Tensor:
    """Return the summed loss, the right predictions and the targets of a batch, fp64 (3,)."""
    with precision.autocast():
        loss_sum, n_right = summed_loss(model, tokens, targets, starts, return_accuracy=True)
    n_targets = (targets != IGNORE_INDEX).sum()
    return torch.stack([loss_sum.double(), n_right.double(), n_targets.double()])
