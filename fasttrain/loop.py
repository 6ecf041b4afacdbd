"""`train_loop`: the shortest way to train a custom model on a custom data loader."""

from collections.abc import Iterable
from typing import Any

import torch
from fasttrain_kernels import clip_grad_norm_
from torch import Tensor, nn

from fasttrain.config import LoopConfig, TrainConfig, UserError
from fasttrain.device import Precision, resolve_device
from fasttrain.objective import Objective

__all__ = ["train_loop"]


def train_loop(
    model: nn.Module,
    train_dataloader: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    num_epochs: int,
    max_grad_norm: float | None = 1.0,
    log_interval: int = 100,
    device: str | torch.device = "cuda",
    quiet: bool = False,
) -> dict[str, list[float] | list[int]]:
    """Train ``model`` for some passes over ``train_dataloader``.

    Args:
        model: its output, or that output's ``logits`` or first element, is logits (B, T, V); moved
            to ``device``, left in training mode.
        train_dataloader: batches as `Trainer` takes them: mappings with ``input_ids`` and
            ``target_ids`` or ``labels``, or pairs of input ids and targets, integers (B, T) each; a
            target of −100 is left out of the loss. Iterated anew each epoch.
        optimizer: over the model's parameters; a schedule may change its learning rate outside,
            for instance from a hook on ``optimizer.step``.
        num_epochs: passes over the data, at least 0.
        max_grad_norm: the gradient is clipped to this norm before the update; None: never.
        log_interval: every so many steps, and after the last, the loss is recorded: the only steps
            that wait for the device.
        device: where to train.
        quiet: do not print a line, such as ``Epoch 0, step 100, loss 2.3456``, for each loss that
            is recorded; epochs count from 0.

    Returns:
        ``losses``, the mean loss in nats a token of single batches, and ``steps``, their numbers,
        counted from 1 over all epochs; of equal length.

    Raises:
        UserError: a batch lacks a key or has the wrong shape, an epoch has no batch, or the device
            is not there.

    Numerics: cross-entropy in fp32, as `fasttrain_kernels.cross_entropy` describes. The norm is
    clipped as by `torch.nn.utils.clip_grad_norm_`.
    """
    if num_epochs < 0 or log_interval < 1:
        raise UserError(
            f"train_loop: num_epochs = {num_epochs} and log_interval = {log_interval} must be at "
            "least 0 and 1"
        )
    try:
        where = resolve_device(str(device))
    except (RuntimeError, UserError) as error:
        raise UserError(
            f'train_loop: there is no device="{device}" here; use device="cpu"'
        ) from error
    model.to(where).train()
    config = TrainConfig(train=LoopConfig(epochs=1))  # neither smoothing nor compilation
    objective = Objective(model, None, config, where, Precision("fp32", torch.float32, where.type))
    losses: list[float] = []
    steps: list[int] = []
    step = 0

    def record(loss: Tensor) -> None:
        losses.append(loss.item())
        steps.append(step)
        if not quiet:
            print(f"Epoch {epoch}, step {step}, loss {losses[-1]:.4f}", flush=True)

    for epoch in range(num_epochs):
        before = step
        for raw in train_dataloader:
            batch = objective.prepare(raw)
            loss = objective.loss_sum(batch) / batch.n_targets.clamp(min=1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if max_grad_norm is not None:
                clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            step += 1
            if step % log_interval == 0:
                record(loss)
        if step == before:
            raise UserError(
                f"train_loop: epoch {epoch + 1} had no batch; give a DataLoader or a list that has "
                "some (an iterator is empty after one pass)"
            )
    if step and steps[-1:] != [step]:
        record(loss)
    return {"losses": losses, "steps": steps}
