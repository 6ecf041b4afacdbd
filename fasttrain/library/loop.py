"""`train_loop`: the shortest way to train a custom model."""

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from fasttrain.command import tell
from fasttrain.config import UserError
from fasttrain.device import resolve_device
from fasttrain.library.arguments import refuse_model, shown
from fasttrain.library.trainer import Trainer
from fasttrain.log.sinks import RowKind
from fasttrain.printing import say


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
    """Train ``model`` for some passes over ``train_dataloader``: the shortest way to do so.

    Under torchrun the ranks share each step, with DDP or, where a copy of the model does not fit,
    FSDP2; a loss is then the mean over the batches of all ranks.

    Args:
        model: as `Trainer` takes it; moved to ``device``. One that is in evaluation mode is put in
            training mode; of another, parts that are in evaluation mode stay in it.
        train_dataloader: batches as `Trainer` takes them; a target of −100 is left out of the loss.
            A step without targets makes no update, unless its batches lie on a GPU already, where
            to look would wait, and the optimizer is not one of fasttrain_kernels.
        optimizer: over the model's parameters; a hook on its ``step`` may change its learning rate.
        num_epochs: passes over the data, at least 0.
        max_grad_norm: the gradient is clipped to this norm before the update; None: never.
        log_interval: every so many steps, and after the last, the loss is recorded, unless the step
            had no targets: the only steps that wait for the device.
        device: where to train. "cuda" is the CPU where there is no CUDA device, which a line says.
        quiet: do not print each recorded loss, as in ``Epoch 0, step 100, loss 2.3456``.

    Returns:
        ``losses``, the mean loss in nats a token of single batches, and ``steps``, their numbers,
        counted from 1 over all epochs; of equal length.

    Raises:
        UserError: a batch lacks a key or has the wrong shape, an epoch has no batch, or the device
            is not there.

    Numerics: cross-entropy in fp32, as `fasttrain_kernels.cross_entropy` describes. The norm is
    clipped as by `torch.nn.utils.clip_grad_norm_`.
    """
    refuse_model(model, "train_loop")
    for name, value in (("num_epochs", num_epochs), ("log_interval", log_interval)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise UserError(f"train_loop: {name} is {shown(value)}; pass an integer")
    if max_grad_norm is not None and (
        isinstance(max_grad_norm, bool) or not isinstance(max_grad_norm, Real)
    ):
        raise UserError(
            f"train_loop: max_grad_norm is {shown(max_grad_norm)}; pass a number, or None to clip "
            "nothing"
        )
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise UserError(
            f"train_loop: max_grad_norm is {max_grad_norm}; pass a number > 0, or None to clip "
            "nothing"
        )
    if num_epochs < 0 or log_interval < 1:
        raise UserError(
            f"train_loop: num_epochs = {num_epochs} and log_interval = {log_interval} must be at "
            "least 0 and 1"
        )
    if str(device) == "cuda" and not torch.cuda.is_available():
        tell("train_loop: there is no CUDA device here; training on the CPU")
        device = "cpu"
    try:
        where = resolve_device(str(device))
    except (RuntimeError, UserError) as error:
        raise UserError(
            f'train_loop: there is no device="{device}" here; use device="cpu"'
        ) from error
    sections = {
        "run": {"device": str(where), "dtype": "fp32"},
        "train": {"epochs": max(1, num_epochs)},
        "log": {"every_steps": log_interval},
    }
    precision_of_caller = torch.get_float32_matmul_precision()
    trainer = _LoopTrainer(model, optimizer, sections, num_epochs, max_grad_norm, quiet=quiet)
    torch.set_float32_matmul_precision(precision_of_caller)
    if num_epochs:
        trainer.train(train_dataloader)
    return {"losses": trainer.losses, "steps": trainer.steps}


class _LoopTrainer(Trainer):
    """Makes every step, whatever its numbers are, and keeps the losses that are recorded.

    An optimizer that cannot read a verdict on the device would wait for it at each step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sections: dict[str, Any],
        num_epochs: int,
        max_grad_norm: float | None,
        *,
        quiet: bool,
    ) -> None:
        super().__init__(model, optimizer, config=sections, quiet=True)
        self.train_step.judges = False
        self.train_step.max_grad_norm = max_grad_norm
        self.losses: list[float] = []
        self.steps: list[int] = []
        self._num_epochs = num_epochs
        self._prints = not quiet and self.world.leads

    def _write_row(self, kind: RowKind, row: dict[str, float]) -> None:
        if "loss" not in self.metrics.last():  # of a step without targets
            return
        self.losses.append(row["loss"])
        self.steps.append(self.step)
        if self._prints:
            epoch = min(self.epoch, self._num_epochs - 1)  # the last row comes after its epoch
            say(f"Epoch {epoch}, step {self.step}, loss {row['loss']:.4f}")
