"""The blocks' matrix products in fp8 while a model trains; torchao's, with a scale for each tensor.

Every factor is scaled to its own largest magnitude at every product (dynamic scaling), activations
and weights to e4m3, gradients to e5m2; sums run in fp32. Embeddings, the head and the attention's
own products stay as they are. Parameters do too: fp32, under their own names, so that checkpoints
are those of any run, and a run can be resumed with or without fp8. In ``eval`` mode the same
modules multiply in bf16. Source: Micikevicius et al. 2022, FP8 Formats for Deep Learning
(arXiv:2209.05433).
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.config import UserError
from fasttrain.model.transformer import Transformer

__all__ = ["multiply_in_fp8"]

HOPPER = (9, 0)
MULTIPLE = 16  # of both sides of a matrix: what the hardware's fp8 product takes


def multiply_in_fp8(model: Transformer, device: torch.device, *, emulate: bool = False) -> None:
    """Make the linear layers of the blocks multiply in fp8 in ``train`` mode; again: no effect.

    Before parameters are spread over ranks; an optimizer made before keeps them.

    Args:
        model: changed in place; its parameters and their names stay.
        device: of the model.
        emulate: multiply factors rounded to fp8 in a wider type, on any device: for tests.

    Raises:
        UserError: the device has no fp8, torchao is not installed, or a matrix does not fit.
    """
    if not emulate:
        _require_hopper(device)
    for name, module in model.blocks.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if type(module) is not nn.Linear:
            return
        if module.in_features % MULTIPLE or module.out_features % MULTIPLE:
            raise UserError(
                f"run.fp8 = true: blocks.{name} is a matrix of {module.out_features} × "
                f"{module.in_features}, and fp8 products take multiples of {MULTIPLE}; change "
                "model.dim, model.head_dim or model.hidden_dim, or unset run.fp8"
            )
    if importlib.util.find_spec("torchao") is None:
        raise UserError(
            "run.fp8 = true needs torchao, which is not installed; pip install torchao, or "
            "unset run.fp8"
        )
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # Padding acts where the tokens of a micro-batch are no multiple of 16.
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    convert_to_float8_training(model.blocks, config=config)
    layers = [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    # One class for all, so that what is compiled for one block holds for the others.
    kind = _in_training_alone(type(layers[0]))
    for layer in layers:
        layer.__class__ = kind


def _require_hopper(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= HOPPER:
        return
    found = str(device)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
    raise UserError(
        f"run.fp8 = true needs a GPU of compute capability {HOPPER[0]}.{HOPPER[1]} (Hopper) or "
        f"newer, got {found}; unset run.fp8"
    )


def _in_training_alone(fp8_linear: type[nn.Linear]) -> type[nn.Linear]:
    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        if self.training:
            y: Tensor = fp8_linear.forward(self, x)
            return y
        return F.linear(x, self.weight, self.bias)

    return type(f"Training{fp8_linear.__name__}", (fp8_linear,), {"forward": forward})
