"""One training step on the device: forward, backward, norm, verdict, update. Nothing here syncs.

The loss of a step is the sum over all its target tokens divided by the number of those not ignored,
so that neither loss nor gradient depends on how the step is cut into micro-batches and over ranks.
That number is known before the first forward pass and goes into the loss, so every gradient, also
one that a hook sees, is a gradient of the mean. Ranks reduce gradients with the last micro-batch
alone, and after it loss and norm, in one small reduction: what they judge a step by is the same,
and so is the verdict.

A step owns its gradients. It begins without any, and it judges, clips and applies those of the
parameters that train at that moment: they require a gradient, and an optimizer holds them.

Legend: B micro-batch rows, T sequence, D dim, V vocabulary.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from fasttrain_kernels import grad_norm, linear_cross_entropy
from fasttrain_kernels._torch import drop_unreduced_gradients, has_step_hooks
from fasttrain_kernels.grad_norm import local_tensor
from torch import Tensor, nn
from torch.func import functional_call

from fasttrain.config import TrainConfig, UserError
from fasttrain.data.loader import IGNORE_INDEX, Batch
from fasttrain.distributed.sharding import replicate, set_gradient_sync, time_collectives
from fasttrain.distributed.world import checksum
from fasttrain.engine.ema import Ema
from fasttrain.engine.optim import parameters_of, set_lr
from fasttrain.engine.spikes import SpikeWindow
from fasttrain.engine.state import restore_rng, rng_state
from fasttrain.log.timing import StepClock
from fasttrain.model.runtime import compile_function, multiply_in_fp8, prepare_blocks
from fasttrain.model.transformer import Transformer
from fasttrain.resolve import Resolved

# The verdict on a step; all but the first make no update. An overflow is an fp16 gradient that a
# smaller scale may still hold. TRANSIENT: a re-run disagreed once, then agreed. PERSISTENT: no two
# runs agreed. EMPTY: no target counted, so that there is nothing to learn.
FINE, OVERFLOW, NONFINITE, SPIKE, TRANSIENT, PERSISTENT, EMPTY = range(7)

# model, tokens, targets, doc_starts, scale → summed loss times scale, a scalar on the device; of
# other batches: model, batch, scale
LossSum = Callable[..., Tensor]


def summed_loss(
    model: Transformer,
    tokens: Tensor,
    targets: Tensor,
    doc_starts: Tensor | None,
    scale: Tensor | None = None,
    **options: Any,
) -> Any:
    """Return the loss summed over tokens, times ``scale``; ``options`` are the operation's own.

    Head and cross-entropy are one operation.
    """
    return linear_cross_entropy(
        model.hidden(tokens, doc_starts=doc_starts),
        model.head_weight,
        targets,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        softcap=model.config.logit_softcap,
        scale=scale,
        **options,
    )


def default_criterion(config: TrainConfig, *, scaled: bool = False) -> LossSum:
    """Return the criterion of our Transformer, as the config says; its gradient may be scaled."""
    options: Any = {"label_smoothing": config.train.label_smoothing, "z_loss": config.train.z_loss}
    return partial(summed_loss, unit_gradient=not scaled, **options)


def _scale_gradients(optimizer: torch.optim.Optimizer, scale: Tensor) -> None:
    """Multiply the gradients of an optimizer's parameters, this rank's part of them."""
    grads = [local_tensor(p.grad) for p in parameters_of(optimizer) if p.grad is not None]
    if grads:
        torch._foreach_mul_(grads, scale)


class StepNumbers(NamedTuple):
    """A step as the host sees it: mean loss, gradient norm before clipping, verdict, fp16 scale."""

    loss: float
    norm: float
    verdict: int
    grad_scale: float = 1.0  # of the next step


class TrainStep:
    """The numbers of a run that live on the device, and the step that changes them.

    Args:
        resolved: the settings of the run, for its device and its ranks.
        criterion: of a custom model, which is compiled in there if at all; its batches have
            ``targets``. None: our Transformer's loss, compiled as ``run.compile`` says.
        n_micro: micro-batches of a step, of a custom model; None: as the config says.
        ignore_index: the target that does not count.
        count: returns what the loss of a step is divided by, of one batch: a number where the host
            knows it, else a scalar on the device. None: the number of targets that count.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        resolved: Resolved,
        *,
        criterion: LossSum | None = None,
        n_micro: int | None = None,
        ignore_index: int = IGNORE_INDEX,
        count: Callable[[Any], Tensor | float] | None = None,
    ) -> None:
        config, device, world = resolved.config, resolved.device, resolved.world
        precision, sharded, loop = resolved.precision, world.sharded, config.train
        self.world = world
        self.model, self.optimizers = model, list(optimizers)
        self.precision = precision
        self.attention = resolved.attention
        self.max_grad_norm, self.max_grad_value = loop.max_grad_norm, loop.max_grad_value
        self.ema = Ema(model, loop.ema_decay)
        self.before_update: Callable[[], None] = lambda: None  # until then nothing has changed
        self.ignore_index = ignore_index
        self.count = count or self._count
        self.judges = True  # False: every step is made, whatever its numbers are
        self._is_custom = custom = criterion is not None
        self.criterion = criterion or default_criterion(config, scaled=precision.scaled)
        self.objective = nn.ModuleDict({"model": model})
        self.objective.forward = partial(self.criterion, model)
        # A custom model is compiled by itself, if at all: not with the loss
        self.compile_mode = "off" if custom else resolved.compile_mode
        self.loss_fn: Callable[..., Tensor] = self._loss
        if n_micro is None:
            assert resolved.shape is not None
            n_micro = resolved.shape.n_micro
        self.n_micro = n_micro
        accumulates = self.n_micro > 1
        captures = self.compile_mode in ("cuda-graphs", "max-autotune")
        # Copies in half precision of parameters, by name, of which gradients are taken in place of
        # the parameters' own (`_round_once`)
        self.copies: dict[str, Tensor] = {}
        if isinstance(model, Transformer):
            if config.run.fp8:
                multiply_in_fp8(model, device)
            prepare_blocks(
                model,
                activation_checkpointing=loop.activation_checkpointing,
                mode=self.compile_mode,
                sharded=sharded,
                dtype=precision.compute,
            )
        if self.compile_mode not in ("off", "c++", "blocks"):
            bias = config.model.bias
            self.loss_fn = compile_function(self._loss, self.compile_mode, has_bias=bias)
        self._loss_of_rank = self.loss_fn  # on one rank: DDP's module calls it
        self._rounds_once = resolved.rounds_once and not custom
        # Gradients that are zeroed, not dropped. DDP's would lie beside its buckets until the last
        # micro-batch, and then in both; those of a CUDA graph in the graph's own pool, where the
        # next micro-batch overwrites them. A custom model may leave some parameters unused, which
        # then have no gradient, and are not decayed either.
        outside = self._rounds_once or (captures and not sharded)
        self.keeps_grads = accumulates and ((world.mode == "ddp" and not custom) or outside)
        self.every: list[Tensor] = []  # all parameters of the model and the optimizers
        self.parameters: list[Tensor] = []  # those that train, in the same order
        # What gradients are taken of where they are kept, by the parameter's name in `objective`:
        # parameters, or `copies` of them
        self.leaves: dict[str, Tensor] = {}
        self.clock = StepClock(device, n_phases=2)
        self.network: nn.Module = model
        self._replicated: list[int] = []  # the parameters that DDP reduces gradients of
        self._begin()
        time_collectives(self.network, world, self.clock, accumulates=accumulates)
        fp32: Any = {"dtype": torch.float32, "device": device}
        # Of the last step: mean over its target tokens, norm before clipping, verdict
        self.loss = torch.zeros((), **fp32)
        self.norm = torch.zeros((), **fp32)
        self.verdict = torch.zeros((), **fp32)
        # The `StepNumbers` of the steps since `numbers` was called, up to its last row
        self.history = torch.zeros(config.log.every_steps, len(StepNumbers._fields), **fp32)
        self.n_unread = 0
        self.has_targets = torch.ones((), dtype=torch.bool, device=device)  # the step, on any rank
        # What `has_targets` tells of this rank's batches, None where the host does not know it
        self._known_targets: bool | None = None
        # What gradients are multiples of, in fp16, which has few exponents, and the clean steps
        # since it changed
        self.grad_scale = torch.full((), 2.0**16 if precision.scaled else 1.0, **fp32)
        self.growth_tracker = torch.zeros((), dtype=torch.int32, device=device)
        self.window: SpikeWindow | None = None
        if loop.on_spike != "off":
            self.window = SpikeWindow(loop.spike_window_steps, loop.spike_sigmas, device)

    def _count(self, batch: Any) -> Tensor:
        n_targets: Tensor = (batch.targets != self.ignore_index).sum()
        return n_targets

    def _loss(self, *inputs: Any) -> Tensor:
        with self.precision.autocast():
            if self.copies:
                loss: Tensor = functional_call(self.objective, self.copies, inputs)
                return loss
            return self.criterion(self.model, *inputs)

    def _begin(self) -> None:
        """See which parameters train now, and drop every gradient that is there already.

        A gradient may be left by an exception in an earlier step, by a backward pass of the
        caller's, or on a parameter that no optimizer holds.
        """
        own = {id(p): p for p in self.model.parameters()}
        held = {id(p): p for optimizer in self.optimizers for p in parameters_of(optimizer)}
        self.every = [*(own | held).values()]
        training = {key for key, p in held.items() if p.requires_grad}
        parameters = [p for p in self.every if id(p) in training]
        if [*map(id, parameters)] != [*map(id, self.parameters)]:
            self.parameters = parameters
            self.ema.follow(parameters)
            self._take_leaves(training)
        if self.world.mode == "ddp":
            self._replicate([key for key, p in own.items() if p.requires_grad])
        self._drop_gradients()
        if self.world.sharded:
            drop_unreduced_gradients(self.model)

    def _take_leaves(self, training: set[int]) -> None:
        """Name what gradients are taken of, and make the copies of `_round_once`."""
        named = self.objective.named_parameters()
        self.leaves = {name: p for name, p in named if id(p) in training}
        self.copies = {}
        if self._rounds_once:
            self._round_once()

    def _round_once(self) -> None:
        """Have a step round the blocks' matrices once for all of its micro-batches.

        The bits are those of autocast, which rounds each time, and widens each gradient.
        """
        dtype = self.precision.compute
        for name, p in self.leaves.items():
            if name.startswith("model.blocks.") and p.ndim == 2:
                self.copies[name] = torch.empty_like(p, dtype=dtype, requires_grad=True)
        self.leaves |= self.copies

    def _replicate(self, requiring_grad: list[int]) -> None:
        """Wrap the model in DDP, anew where other parameters require a gradient than before.

        DDP's module holds the model and returns the loss.
        """
        if self._replicated == requiring_grad:
            return
        again = bool(self._replicated)
        if again:  # before the new module there must be none that reduces the same gradients
            self.network = self.model
            self.loss_fn = self._loss_of_rank
            gc.collect()
        self._replicated = requiring_grad
        self.objective.forward = self._loss_of_rank
        self.network = self.loss_fn = replicate(self.objective, custom=self._is_custom)
        if again:
            accumulates = self.n_micro > 1
            time_collectives(self.network, self.world, self.clock, accumulates=accumulates)

    def _drop_gradients(self) -> None:
        """Drop all gradients, but zero those that are kept from one step to the next."""
        if not self.keeps_grads:
            for p in self.every:
                p.grad = None
            return
        kept = [p.grad for p in self.parameters if p.grad is not None]
        if kept:
            torch._foreach_zero_(kept)
        training = set(map(id, self.parameters))
        for p in self.every:
            if id(p) not in training:
                p.grad = None
            elif p.grad is None:
                p.grad = torch.zeros_like(p)

    def __call__(self, batches: Sequence[Any], lr: float | None) -> None:
        """Run one step over its micro-batches with learning rate ``lr``; None: the optimizers'."""
        with self._owned():
            self.clock.mark(0)
            loss, grads = self._backward(batches)
            self.clock.mark(1)
            self._finish(*self._measure(loss, grads), grads, lr)

    def recheck(self, batches: Sequence[Any], lr: float | None) -> None:
        """As a call, but forward and backward run twice; no update is made where they differ.

        Loss, norm and gradients are compared bit for bit. Where they differ on any rank, a third
        time tells what happens once from what happens each time. Waits for the device.
        """
        with self._owned():
            self.clock.mark(0)
            rng, seen = rng_state(self.loss.device), list[list[int]]()
            for alike in (PERSISTENT, FINE, TRANSIENT):  # the verdict where it comes out as before
                if seen:
                    restore_rng(rng, self.loss.device)
                    self._drop_gradients()
                loss, grads = self._backward(batches)
                measured = self._measure(loss, grads)
                bits = torch.stack([*(checksum([t]) for t in measured), checksum(grads)]).tolist()
                outcome = max(self.world.gather(alike if bits in seen else PERSISTENT))
                if outcome == FINE:
                    break
                seen.append(bits)
            self.clock.mark(1)
            self._finish(*measured, grads, lr, outcome)

    @contextmanager
    def _owned(self) -> Iterator[None]:
        """Begin a step without gradients, and leave none behind, whatever happens in between."""
        self._begin()
        if not self.parameters:
            raise UserError(
                "train: no parameter that the optimizer holds requires a gradient, so that nothing "
                "would be trained; unfreeze some with requires_grad_()"
            )
        try:
            yield
        finally:
            self._drop_gradients()

    def _backward(self, batches: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
        """Run forward and backward; return this rank's part of the loss, and the gradients.

        The gradients of the ranks, of which the mean is taken, are multiples of `grad_scale`.
        """
        n_targets = self._count_targets(batches)
        summed = self.world.begin_sum(n_targets)
        loss = torch.zeros_like(self.loss)
        if self.copies:
            with torch.no_grad():
                sources = map(self.objective.get_parameter, self.copies)
                torch._foreach_copy_([*self.copies.values()], [*sources])
        summed()
        self.has_targets = n_targets > 0
        unit = self.grad_scale * self.world.size
        scale = unit / torch.where(self.has_targets, n_targets, 1)
        for n_left, batch in zip(reversed(range(len(batches))), batches, strict=True):
            set_gradient_sync(self.network, self.world, sync=n_left == 0)
            ours = isinstance(batch, Batch)
            inputs = (batch.tokens, batch.targets, batch.doc_starts) if ours else (batch,)
            part = self.loss_fn(*inputs, scale)
            if self.keeps_grads and self.world.mode != "ddp":
                new = torch.autograd.grad(part, [*self.leaves.values()])
                pairs = [*zip(self.parameters, new, strict=True)]
                for dtype in {grad.dtype for grad in new}:  # few launches for those in fp32
                    alike = [(p.grad, grad) for p, grad in pairs if grad.dtype == dtype]
                    torch._foreach_add_(*map(list, zip(*alike, strict=True)))
            else:
                part.backward()  # type: ignore[no-untyped-call]
            loss += part.detach()
        return loss / unit, [p.grad for p in self.parameters if p.grad is not None]

    def _count_targets(self, batches: Sequence[Any]) -> Tensor:
        """Return what the loss of this rank's batches is divided by, an fp32 scalar."""
        counts = [self.count(batch) for batch in batches]
        known = [count for count in counts if not isinstance(count, Tensor)]
        self._known_targets = any(known) if len(known) == len(counts) else None
        if self._known_targets is not None:  # a fill, which waits for nothing
            return torch.full_like(self.loss, sum(known))
        totals = [torch.as_tensor(count, device=self.loss.device) for count in counts]
        return (totals[0] if len(totals) == 1 else torch.stack(totals).sum()).float()

    def _finish(
        self, loss: Tensor, norm: Tensor, grads: list[Tensor], lr: float | None, outcome: int = FINE
    ) -> None:
        """Judge the step and update; ``outcome`` is what `recheck` has found."""
        self.loss, self.norm = loss, norm
        self.before_update()
        self.verdict = verdict = (
            self._judge() if outcome == FINE else torch.full_like(loss, outcome)
        )
        bad = (verdict != FINE).float()
        clip = 1 / self.grad_scale
        if self.max_grad_norm is not None:
            clip = clip * torch.clamp(self.max_grad_norm / (self.norm + 1e-6), max=1.0)
        if self.max_grad_value is not None:  # of what the optimizers will see, times clip
            limit = self.max_grad_value / clip
            for grad in grads:
                local_tensor(grad).clamp_(-limit, limit)
        for optimizer in self.optimizers:
            step: Any = optimizer.step
            if lr is not None:
                set_lr(optimizer, lr)
            if getattr(optimizer, "reads_clip_on_device", False):
                if has_step_hooks(optimizer):
                    _scale_gradients(optimizer, clip)
                    step(found_inf=bad)
                else:
                    step(clip_coefficient=clip, found_inf=bad)
            elif self._makes_update(bad):
                _scale_gradients(optimizer, clip)
                step()
        self.ema.update(skipped=bad)
        if self.precision.scaled:  # halve after an overflow, double after 2,000 clean steps
            inf = torch.where(verdict >= SPIKE, 0.0, bad)
            torch._amp_update_scale_(self.grad_scale, self.growth_tracker, inf, 2.0, 0.5, 2000)
        row = min(self.n_unread, len(self.history) - 1)
        # In the order of `StepNumbers`
        self.history[row] = torch.stack([self.loss, self.norm, verdict, self.grad_scale])
        self.n_unread = row + 1
        self.clock.mark(2)

    def _makes_update(self, bad: Tensor) -> bool:
        """Return whether an optimizer is to step that cannot read the verdict on the device.

        That waits for the device. Where steps are not judged it waits only if the host knows that
        this rank has no targets: those that lie on a GPU already are not looked at.
        """
        if not self.judges and (
            self._known_targets or (self._known_targets is None and bad.is_cuda)
        ):
            return True
        return not bad

    def _measure(self, loss: Tensor, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the step's loss and gradient norm, alike on all ranks, from `_backward`'s."""
        world = self.world
        if world.sharded:
            sums = torch.stack([loss, grad_norm(grads).norm.square()])
            loss, squares = world.sum(sums).unbind()
            return loss, (squares / world.n_copies).sqrt() / self.grad_scale
        summed = world.begin_sum(loss)
        norm = grad_norm(grads).norm
        summed()
        return loss, norm / self.grad_scale

    def _judge(self) -> Tensor:
        """Return the verdict on this step, an fp32 scalar."""
        empty = torch.where(self.has_targets, float(FINE), float(EMPTY))
        if not self.judges:
            return empty
        finite = torch.isfinite(self.loss + self.norm)
        verdict = torch.where(finite, empty, float(NONFINITE))
        if self.precision.scaled:
            overflow = torch.isfinite(self.loss) & ~finite & (self.grad_scale > 1)
            verdict = torch.where(overflow, float(OVERFLOW), verdict)
        if self.window is not None:
            spike = self.window.judge(self.loss, self.norm, finite & self.has_targets)
            verdict = torch.where(spike, float(SPIKE), verdict)
        return verdict

    def numbers(self) -> list[StepNumbers]:
        """Bring the numbers of the steps since the last call to the host: one sync."""
        rows = self.history[: self.n_unread].tolist()
        self.n_unread = 0  # not before: while this thread waits, another may ask
        return [StepNumbers(loss, norm, int(verdict), *more) for loss, norm, verdict, *more in rows]

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that resuming needs."""
        tensors = {"grad_scale": self.grad_scale, "growth_tracker": self.growth_tracker}
        if self.window is not None:
            tensors |= {"spike_values": self.window.values, "spike_count": self.window.count}
        return tensors

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned; a window of another size begins empty."""
        self.n_unread, mine = 0, self.state()
        fits = all(name in state and state[name].shape == t.shape for name, t in mine.items())
        for name, tensor in mine.items():
            if fits or not name.startswith("spike"):
                tensor.copy_(state[name])
            else:
                tensor.zero_()
