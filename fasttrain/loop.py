"""`train_loop`: the shortest way to train a model of one's own on a data loader of one's own."""

from collections.abc import Iterable, Mapping

import torch
from fasttrain_kernels import clip_grad_norm_, cross_entropy
from torch import Tensor, nn

from fasttrain.config import UserError
from fasttrain.device import resolve_device

__all__ = ["train_loop"]


def train_loop(
    model: nn.Module,
    train_dataloader: Iterable[Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    num_epochs: int,
    max_grad_norm: float | None = 1.0,
    log_interval: int = 100,
    device: str | torch.device = "cuda",
) -> dict[str, list[float] | list[int]]:
    """Train ``model`` for some passes over ``train_dataloader``.

    Args:
        model: maps token ids, int64 (B, T), to logits (B, T, V); moved to ``device``, left in
            training mode.
        train_dataloader: batches with ``input_ids`` and ``target_ids``, int64 (B, T) each; a target
            of −100 is left out of the loss. Iterated anew each epoch.
        optimizer: over the model's parameters; a schedule may change its learning rate outside,
            for instance from a hook on ``optimizer.step``.
        num_epochs: passes over the data, at least 0.
        max_grad_norm: the gradient is clipped to this norm before the update; None: never.
        log_interval: every so many steps the loss is recorded: the only steps that wait for the
            device.
        device: where to train.

    Returns:
        ``losses``, the mean loss in nats a token of single batches, and ``steps``, their numbers,
        counted from 1 over all epochs; of equal length.

    Raises:
        UserError: a batch lacks a key or has the wrong shape, or the device is not there.

    Numerics: cross-entropy in fp32, as `fasttrain_kernels.cross_entropy` describes. The norm is
    clipped as by `torch.nn.utils.clip_grad_norm_`.
    """
    if num_epochs < 0 or log_interval < 1:
        raise UserError(
            f"train_loop: num_epochs = {num_epochs} and log_interval = {log_interval} must be at "
            "least 0 and 1"
        )
    where = resolve_device(str(device))
    model.to(where).train()
    losses: list[float] = []
    steps: list[int] = []
    step = 0
    for _ in range(num_epochs):
        for batch in train_dataloader:
            tokens, targets = _pair(batch, where)
            logits = model(tokens)
            if logits.shape[:-1] != targets.shape:
                raise UserError(
                    f"train_loop: the model returned {tuple(logits.shape)} for tokens "
                    f"{tuple(tokens.shape)}; it must return logits (B, T, V)"
                )
            loss = cross_entropy(logits.flatten(0, -2), targets.flatten())
            assert isinstance(loss, Tensor)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if max_grad_norm is not None:
                clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            step += 1
            if step % log_interval == 0:
                losses.append(loss.item())
                steps.append(step)
    return {"losses": losses, "steps": steps}


def _pair(batch: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    missing = [k for k in ("input_ids", "target_ids") if k not in batch]
    if missing:
        raise UserError(
            f"train_loop: a batch has {sorted(batch)} but no {missing[0]!r}; make the data loader "
            "give input_ids and target_ids"
        )
    tokens, targets = batch["input_ids"], batch["target_ids"]
    if tokens.shape != targets.shape:
        raise UserError(
            f"train_loop: input_ids has shape {tuple(tokens.shape)} but target_ids "
            f"{tuple(targets.shape)}; each token needs one target"
        )
    return tokens.to(device, non_blocking=True), targets.to(device, non_blocking=True)
