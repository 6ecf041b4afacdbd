"""How a model runs while it trains: what is compiled, and what blocks keep for backward.

With activation checkpointing a block keeps only its input, or with ``selective`` what is costly to
compute as well, and its backward pass computes the rest again, by the same operations: the same
numbers. Source: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost (arXiv:1604.06174).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch
from fasttrain_kernels.cpu.blocks import build, run_blocks_on_cpu
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fasttrain.config import UserError, refuse
from fasttrain.model.transformer import Block, Transformer, run_block, run_blocks

P = ParamSpec("P")
R = TypeVar("R")


def compiles_evaluation(device: torch.device) -> bool:
    """Return whether evaluation is compiled where training is.

    On a CPU it takes longer to compile than all of the evaluation takes without it.
    """
    return device.type == "cuda"


def compile_function(fn: Callable[P, R], mode: str, *, has_bias: bool = False) -> Callable[P, R]:
    """Return ``fn`` compiled as one graph of static shapes; a graph break is an error.

    To save time in each step, its code does not check the sizes that operations return, nor the
    globals of Python modules. It checks arguments, parameters and the attributes of modules.
    """
    if mode != "default":  # a mode of torch.compile goes with no options
        inductor_mode = "reduce-overhead" if mode == "cuda-graphs" else mode
        return torch.compile(fn, fullgraph=True, dynamic=False, mode=inductor_mode)
    options: dict[str, Any] = {
        "size_asserts": False,
        "alignment_asserts": False,
        "guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe,
        # On a GPU sums of biases need it to become part of other kernels; without biases it keeps
        # the cast of a norm's gradient, of another shape, out of its kernel: 20 bytes an element,
        # not 16. Code for a CPU is the same.
        "loop_ordering_after_fusion": has_bias,
    }
    return torch.compile(fn, fullgraph=True, dynamic=False, options=options)


# The operations whose results ``selective`` keeps: matrix products and attention.
_COSTLY = ["mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu"]
_COSTLY += [f"_scaled_dot_product_{name}_attention" for name in ("flash", "efficient", "cudnn")]


def prepare_blocks(
    model: Transformer,
    *,
    activation_checkpointing: str,
    mode: str,
    sharded: bool,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Set how the blocks of ``model`` are run in training; on CUDA in evaluation, if compiled.

    ``mode`` ``blocks`` compiles one block for all; ``c++`` has `fasttrain_kernels.cpu.blocks` run
    them, with products in ``dtype``. If the model is sharded, a block's parameters are gathered
    when it is called as a module: what is compiled or computed again lies inside that call.
    """
    plain: Callable[..., Tensor] = Block.forward if sharded else run_block
    run, kind = plain, activation_checkpointing
    if kind in ("full", "selective"):
        kept = [getattr(torch.ops.aten, name).default for name in _COSTLY]
        contexts = partial(create_selective_checkpoint_contexts, kept)
        options: Any = {"context_fn": contexts} if kind == "selective" else {}
        run = partial(checkpoint, plain, use_reentrant=False, **options)
    elif kind != "none":
        refuse("train.activation_checkpointing", kind, "is not implemented; add it to runtime.py")
    if mode == "blocks":
        run = compile_function(run, "default")
    run_plain, run_all = partial(run_blocks, run=plain), partial(run_blocks, run=run)
    if mode == "c++":
        try:
            build(dtype)  # now rather than in the first step
        except RuntimeError as e:
            message = f"the C++ of a block was not built; use run.compile=off: {e}"
            raise UserError(message) from e
        run_all = partial(run_blocks_on_cpu)

    def run_here(
        blocks: Any, norm: Any, x: Tensor, rope: Any, mask: Any, caches: Any, *rest: Any
    ) -> Tensor:
        compiled = mode == "blocks" and compiles_evaluation(x.device)
        trains = caches is None and (compiled or torch.is_grad_enabled())
        return (run_all if trains else run_plain)(blocks, norm, x, rope, mask, caches, *rest)

    def run_alone(
        block: nn.Module, x: Tensor, rope: Any, mask: Any, cache: Any, start: int, value: Any
    ) -> Tensor:
        caches, values = (None if one is None else [one] for one in (cache, value))
        return run_here([block], None, x, rope, mask, caches, start, values)

    if not sharded:
        model.blocks_fn = run_here
        return
    for block in model.blocks:
        block.forward = partial(run_alone, block)


HOPPER = (9, 0)
MULTIPLE = 16  # of both sides of a matrix: what the hardware's fp8 product takes


def multiply_in_fp8(model: Transformer, device: torch.device, *, emulate: bool = False) -> None:
    """Make the linear layers of the blocks multiply in fp8 in ``train`` mode; again: no effect.

    Parameters and their names stay. With ``emulate`` factors are rounded to fp8 and multiplied in
    a wider type, on any device: for tests.
    """
    on_cuda, found = device.type == "cuda", str(device)
    capability = torch.cuda.get_device_capability(device) if on_cuda and not emulate else (0, 0)
    if not emulate and capability < HOPPER:
        if on_cuda:
            major, minor = capability
            found = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
        newer = f"compute capability {HOPPER[0]}.{HOPPER[1]} (Hopper) or newer"
        refuse("run.fp8", True, f"needs a GPU of {newer}, got {found}; unset run.fp8")
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
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        refuse("run.fp8", True, f"needs torchao ({error}); pip install torchao, or unset run.fp8")
    # Padding acts where the tokens of a micro-batch are no multiple of 16.
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    convert_to_float8_training(model.blocks, config=config)
    layers = [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    fp8_linear = type(layers[0])

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        multiply = fp8_linear.forward if self.training else nn.Linear.forward
        return multiply(self, x)

    # One class for all, so that what is compiled for one block holds for the others.
    kind = type(f"Training{fp8_linear.__name__}", (fp8_linear,), {"forward": forward})
    for layer in layers:
        layer.__class__ = kind
