"""How a model lies on several ranks: whole on each (DDP), or each block in shards (FSDP2).

Which slice of a whole tensor lies on this rank is found without asking the others.

DDP and FSDP2 average gradients over the ranks: the loss is to be weighted by their number. Sources:
Li et al. 2020, PyTorch Distributed (arXiv:2006.15704); Zhao et al. 2023, PyTorch FSDP
(arXiv:2304.11277).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from fasttrain_kernels._torch import TorchDispatchMode, fsdp_collectives
from torch import Tensor, nn

from fasttrain.config import DistributedConfig, TrainConfig, UserError
from fasttrain.device import resolve_device
from fasttrain.distributed.world import World, choose_mode, start
from fasttrain.log.timing import StepClock

M = TypeVar("M", bound=nn.Module)


def replicate(objective: nn.Module, *, custom: bool) -> nn.Module:
    """Wrap a module, which holds the parameters and returns the loss, in DDP.

    Of a ``custom`` model each forward takes rank 0's buffers, and a step may leave parameters
    unused: they have no gradient then, as on one rank.
    """
    ddp = nn.parallel.DistributedDataParallel
    if not custom:  # broadcast_buffers=False is deprecated since torch 2.13
        names = [name for name, _ in objective.named_buffers()]
        ddp._set_params_and_buffers_to_ignore_for_model(objective, names)  # type: ignore[no-untyped-call]
        return ddp(objective, gradient_as_bucket_view=True)
    # DDP cannot look for unused parameters where a backward pass runs within the backward pass, as
    # with reentrant checkpointing, which transformers' models may use.
    reentrant = any(getattr(m, "is_gradient_checkpointing", False) for m in objective.modules())
    return ddp(objective, gradient_as_bucket_view=True, find_unused_parameters=not reentrant)


def shard(model: nn.Module, world: World, config: DistributedConfig) -> None:
    """Shard the parameters of a model over the ranks, block by block; they become DTensors.

    The blocks (of a custom model: the members of each list of modules) are gathered one by one, the
    next one while one computes. Make optimizers afterwards. Does nothing unless the mode shards.

    Numerics: parameters are gathered in fp32, and autocast rounds them for a product, as on one
        rank. Gathered in bf16, half the bytes, norms and the residual stream would be bf16 too.
    """
    if not world.sharded:
        return
    from torch.distributed import fsdp

    policy = fsdp.MixedPrecisionPolicy(cast_forward_inputs=False)
    shared: Any = {"mesh": world.mesh, "mp_policy": policy}
    for block in _blocks(model):
        fsdp.fully_shard(block, reshard_after_forward=config.reshard_after_forward, **shared)
    # The root keeps embedding, last norm and head whole after its forward: the loss uses the head
    # there.
    fsdp.fully_shard(model, reshard_after_forward=False, **shared)
    if hasattr(model, "hidden"):
        fsdp.register_fsdp_forward_method(model, "hidden")


def place(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> tuple[World, torch.device]:
    """Move a custom model to its device, under torchrun to this rank's, and wrap it as configured.

    All ranks begin with rank 0's parameters. Where they are sharded, ``optimizer`` gets the shards.
    Raises UserError if the ranks do not find each other, the model is wrapped already, or the
    optimizer has made steps.
    """
    world, device = start(config.distributed, resolve_device(config.run.device))
    model.to(device)
    if world.size == 1:
        return world, device
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    if wrapped or any(hasattr(p, "placements") for p in model.parameters()):
        raise UserError(
            "the model is wrapped in DDP or FSDP already; give the model itself, and set "
            "distributed.mode to ddp or fsdp"
        )
    if optimizer.state:
        raise UserError("the optimizer has made steps; give a new one, and load_checkpoint()")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, 0)
    n_parameters = sum(p.numel() for p in model.parameters())
    world = choose_mode(config.distributed, world, n_parameters, device)
    before = dict(model.named_parameters(remove_duplicate=False))
    shard(model, world, config.distributed)
    shards = {id(before[n]): p for n, p in model.named_parameters(remove_duplicate=False)}
    for group in optimizer.param_groups:
        group["params"] = [shards.get(id(p), p) for p in group["params"]]
    return world, device


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield what is gathered by itself."""
    blocks = getattr(model, "blocks", None)
    for module in (blocks,) if isinstance(blocks, nn.ModuleList) else model.children():
        if isinstance(module, nn.ModuleList):
            yield from (m for m in module if not isinstance(m, nn.ModuleList | nn.ModuleDict))
        else:
            yield from _blocks(module)


class Slice(NamedTuple):
    """``begin`` to ``end`` of dimension ``dim``, all of the others, of a tensor of ``shape``."""

    shape: tuple[int, ...]
    dim: int
    begin: int
    end: int

    @classmethod
    def all_of(cls, whole: Tensor) -> "Slice":
        """Return the slice that is all of a tensor; a scalar has no dimension to cut."""
        return cls(tuple(whole.shape), 0, 0, whole.shape[0] if whole.dim() else 1)

    @property
    def local_shape(self) -> tuple[int, ...]:
        length = self.end - self.begin
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])

    def of(self, whole: Tensor) -> Tensor:
        """Return this slice of a whole tensor, a view."""
        return whole.narrow(self.dim, self.begin, self.end - self.begin) if self.shape else whole


def locate(tensor: Tensor) -> tuple[Slice, bool] | None:
    """Return where the local tensor of a DTensor lies in the whole; None for any other tensor.

    Also whether this rank is the first that holds it. Raises TypeError unless the tensor is
    replicated or sharded by one dimension, as FSDP2 does it, on a mesh of any shape.
    """
    if type(tensor) is Tensor or not hasattr(tensor, "placements"):
        return None
    spread: Any = tensor
    mesh, placements = spread.device_mesh, spread.placements
    whole, first = Slice.all_of(tensor), True
    found = whole
    for size, at, placement in zip(mesh.shape, mesh.get_coordinate(), placements, strict=True):
        if placement.is_replicate():
            first = first and at == 0
        elif type(placement).__name__ == "Shard" and found is whole:
            length = tensor.shape[placement.dim]
            step = -(-length // size)  # torch.chunk: the last ones are shorter, or empty
            begin, dim = min(at * step, length), placement.dim % tensor.dim()
            found = Slice(whole.shape, dim, begin, min(begin + step, length))
        else:
            raise TypeError(
                f"checkpoint: a DTensor must be replicated or sharded by one dimension, got "
                f"{tuple(placements)}; redistribute it before saving"
            )
    return found, first


def cut(whole: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor sharded as ``like`` is, this rank's slice copied; no rank waits.

    It is returned as it is if ``like`` is not a DTensor of its shape.
    """
    located = locate(like) if whole.shape == like.shape else None
    if located is None:
        return whole
    from torch.distributed.tensor import DTensor

    local = located[0].of(whole).to(like.device, copy=True).contiguous()
    spread: Any = like
    where: Any = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    result: Tensor = DTensor.from_local(local, spread.device_mesh, spread.placements, **where)
    return result


class _SlicesOfWhole(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives each DTensor its slice of the random numbers, or of the tensor, for the whole of it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        drawn = func in (aten.normal_.default, aten.uniform_.default)
        if not (drawn or func is aten.copy_.default) or locate(args[0]) is None:
            return func(*args, **(kwargs or {}))
        whole = torch.empty(args[0].shape, dtype=args[0].dtype, device="cpu") if drawn else args[1]
        if drawn:
            func(whole, *args[1:], **(kwargs or {}))
        args[0].to_local().copy_(cut(whole, args[0]).to_local())  # type: ignore[attr-defined]
        return args[0]


def make_sharded(
    make: Callable[[], M], world: World, config: DistributedConfig, *, device: torch.device
) -> M:
    """Return a sharded model with the initial parameters of one that is not sharded.

    ``make`` returns the model; its parameters are drawn from torch's CPU generator by each module's
    ``reset_parameters``, then by the model's ``init_weights``.

    Memory: this rank's shards, and on the host one whole parameter at a time.
    """
    with torch.device("meta"):
        model = make()
    shard(model, world, config)
    model.to_empty(device=device)
    with torch.no_grad(), _SlicesOfWhole():  # type: ignore[no-untyped-call]
        for module in model.modules():  # in the order in which they were made
            if reset := getattr(module, "reset_parameters", None):
                reset()
        model.init_weights()  # type: ignore[operator]
    return model


def _gathered(model: nn.Module, world: World) -> list[Any]:
    """Return the modules that FSDP2 gathers one by one, the model first."""
    return [m for m in model.modules() if world.sharded and hasattr(m, "unshard")]


@contextmanager
def evaluating(model: nn.Module, world: World) -> Iterator[None]:
    """Use a model without training it: in evaluation mode, sharded parameters gathered.

    Afterwards each of its modules has its own mode back, which a ``train`` of its own is told.

    All ranks must enter it together and call the model equally often.
    """
    sharded = _gathered(model, world)
    if sharded:
        sharded[0].unshard()  # the model's own
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        # From the model down, while weights are gathered: a module may have merged others into them
        for module, was_training in modes.items():
            if module.training != was_training:
                module.train(was_training)
        for module, was_training in modes.items():  # a shared one was last set by a parent
            module.training = was_training
        for module in sharded:
            module.reshard()


def set_gradient_sync(network: Any, world: World, *, sync: bool) -> None:
    """Have the next backward pass reduce gradients over ranks, or only accumulate them locally."""
    if world.mode == "ddp":
        network.require_backward_grad_sync = sync
    elif world.sharded:
        network.set_requires_gradient_sync(sync)


class _Timed:
    """A collective of FSDP2 that records on a clock when it begins and ends."""

    def __init__(self, collective: Any, clock: StepClock) -> None:
        self.collective, self.clock = collective, clock
        self.allocate = collective.allocate
        self.span: list[Any] = []  # of the last call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.span = self.clock.begin()
        work = self.collective(*args, **kwargs)  # the stream, or a CPU, continues when it is done
        self.clock.end(self.span)
        return work

    def followed(self, reduced: Tensor) -> None:
        """Note that the all-reduce of its result has ended as well."""
        self.clock.end(self.span)


def time_collectives(network: Any, world: World, clock: StepClock, *, accumulates: bool) -> None:
    """Have a clock measure all collectives of parameters and gradients; not a bit changes."""

    def average(_, bucket):  # type: ignore[no-untyped-def]  # DDP takes no other annotation
        gradients = bucket.buffer()
        # As DDP does where it has no hook: gradients that lie in the bucket are divided, others
        # multiplied on the way into it.
        _ = gradients.div_(world.size) if accumulates else gradients.mul_(1 / world.size)
        span = clock.begin()

        def over(done: torch.futures.Future[list[Tensor]]) -> Tensor:
            clock.end(span)
            return done.value()[0]

        return dist.all_reduce(gradients, async_op=True).get_future().then(over)

    if world.mode == "ddp":
        network.register_comm_hook(None, average)
    elif world.sharded and (collectives := fsdp_collectives()):  # else communication_ms is 0
        gather, scatter = (_Timed(collective, clock) for collective in collectives)
        for module in _gathered(network, world):
            module.set_custom_all_gather(gather)
            module.set_custom_reduce_scatter(scatter)
            if world.mode == "hsdp":
                module.set_all_reduce_hook(scatter.followed)
