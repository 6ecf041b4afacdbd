"""`train_loop`: the shortest way to train a custom model on a custom data loader."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fasttrain.config import LogConfig, LoopConfig, TrainConfig, UserError
from fasttrain.device import Precision, resolve_device
from fasttrain.distributed.sharding import place
from fasttrain.engine.step import TrainStep
from fasttrain.objective import Objective, set_epoch, together

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

    Under torchrun the ranks share each step, with DDP or, where a copy of the model does not fit,
    FSDP2; a loss is then the mean over the batches of all ranks.

    Args:
        model: its output, or that output's ``logits`` or first element, is logits (B, T, V); moved
            to ``device``, left in training mode.
        train_dataloader: batches as `Trainer` takes them: mappings with ``input_ids`` and
            ``target_ids`` or ``labels``, or pairs of input ids and targets, integers (B, T) each; a
            target of −100 is left out of the loss. Iterated anew each epoch; the ``set_epoch`` of
            its sampler is called, as a `DistributedSampler` needs it.
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
    # Neither smoothing nor compilation.
    config = TrainConfig(train=LoopConfig(epochs=1), log=LogConfig(every_steps=log_interval))
    optimizer.zero_grad(set_to_none=True)
    world, where = place(model.train(), optimizer, config.distributed, where)
    precision = Precision("fp32", torch.float32, where.type)
    objective = Objective(model, None, config, where, precision)
    update = TrainStep(
        model,
        [optimizer],
        config,
        device=where,
        precision=precision,
        world=world,
        criterion=objective.loss_sum,
        n_micro=1,
        judges=False,
    )
    update.max_grad_norm = max_grad_norm
    losses: list[float] = []
    steps: list[int] = []
    step = 0

    def record() -> None:
        losses.append(update.numbers().steps[-1].loss)
        steps.append(step)
        if not quiet and world.leads:
            print(f"Epoch {epoch}, step {step}, loss {losses[-1]:.4f}", flush=True)

    for epoch in range(num_epochs):
        before = step
        set_epoch(train_dataloader, epoch)
        for batches in together(train_dataloader, 1, world):
            update([objective.prepare(batch) for batch in batches], None)
            step += 1
            if step % log_interval == 0:
                record()
        if step == before:
            raise UserError(
                f"train_loop: epoch {epoch + 1} had no batch; give a DataLoader or a list that has "
                "some (an iterator is empty after one pass)"
            )
    if step and steps[-1:] != [step]:
        record()
    return {"losses": losses, "steps": steps}
