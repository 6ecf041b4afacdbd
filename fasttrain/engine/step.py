"""One training step on the device: forward, backward, norm, verdict, update. Nothing here syncs.

The loss of a step is the sum over all its target tokens divided by the number of those not ignored,
so that neither loss nor gradient depends on how the step is cut into micro-batches and over ranks.
Ranks reduce gradients with the last micro-batch alone, and after it loss and norm, in one small
reduction: what they judge a step by is the same, and so is the verdict.

Legend: B micro-batch rows, T sequence, D dim, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from fasttrain_kernels import grad_norm, linear_cross_entropy
from fasttrain_kernels.grad_norm import local_tensor
from torch import Tensor, nn
from torch.func import functional_call

from fasttrain.config import TrainConfig, UserError
from fasttrain.data.loader import IGNORE_INDEX, Batch
from fasttrain.device import Precision, resolve_attention, resolve_precision
from fasttrain.distributed.sharding import cut, replicate, set_gradient_sync, time_collectives
from fasttrain.distributed.world import World, checksum
from fasttrain.engine.optim import parameters_of, set_lr
from fasttrain.engine.schedule import step_shape
from fasttrain.engine.state import restore_rng, rng_state
from fasttrain.log.timing import StepClock
from fasttrain.model.runtime import (
    compile_function,
    multiply_in_fp8,
    prepare_blocks,
    resolve_compile,
)
from fasttrain.model.transformer import Transformer

# The verdict on a step; all but the first make no update. An overflow is an fp16 gradient that a
# smaller scale may still hold. Of a step that was run again and came out otherwise, a third time
# agreed with one before (transient), or with none.
FINE, OVERFLOW, NONFINITE, SPIKE, TRANSIENT, PERSISTENT = range(6)
LEAST_DEVIATION = 0.01  # of a spike window, as a part of its mean

# model, tokens, targets, doc_starts → summed loss; of other batches: model, batch → summed loss
Criterion = Callable[..., Tensor]


def summed_loss(
    model: Transformer, tokens: Tensor, targets: Tensor, doc_starts: Tensor | None, **options: Any
) -> Any:
    """Head and cross-entropy as one operation, summed over tokens; ``options`` are its own."""
    return linear_cross_entropy(
        model.hidden(tokens, doc_starts=doc_starts),
        model.head_weight,
        targets,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        softcap=model.config.logit_softcap,
        **options,
    )


def rounds_once(config: TrainConfig, device: torch.device, precision: Precision) -> bool:
    """Return whether one rank that accumulates has `TrainStep.copies` of our own model."""
    return (
        device.type == "cuda"
        and resolve_compile(config, device) in ("default", "max-autotune-no-cudagraphs")
        and precision.compute.itemsize == 2
        and not config.run.fp8  # which would round twice
        and config.train.activation_checkpointing == "none"  # which saves the memory of copies
    )


def default_criterion(config: TrainConfig, *, scaled: bool = False) -> Criterion:
    """Return the criterion of our Transformer, as the config says; its gradient may be scaled."""
    options: Any = {"label_smoothing": config.train.label_smoothing, "z_loss": config.train.z_loss}
    return partial(summed_loss, unit_gradient=not scaled, **options)


class SpikeWindow:
    """Judges whether a step is far above the W = ``n_steps`` before it; never waits for the device.

    A step is a spike where its loss or its gradient norm lies more than ``sigmas`` standard
    deviations above the mean of the window. Three things keep the window honest. What is not finite
    never enters it. A spike enters as the limit that it passed, so that one of 10⁶ does not hide
    the next, and a level that rose for good is accepted after a while. And the deviation counts as
    at least `LEAST_DEVIATION` of the mean, so that a loss that hardly varies is no row of spikes.
    Nothing is a spike before half of the window is filled.
    """

    def __init__(self, n_steps: int, sigmas: float, device: torch.device) -> None:
        self.sigmas = sigmas
        self.slots = torch.arange(n_steps, device=device)
        # A ring of losses (row 0) and gradient norms (row 1); zero where not yet filled
        self.values = torch.zeros(2, n_steps, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)  # steps that have entered

    def judge(self, loss: Tensor, norm: Tensor, finite: Tensor) -> Tensor:
        """Return whether this step is a spike, and take it into the window if it is ``finite``.

        All are scalars on the device.
        """
        size = len(self.slots)
        filled = self.slots < self.count
        n = self.count.clamp(1, size)
        mean = self.values.sum(1, keepdim=True) / n  # (2, 1)
        deviation = (((self.values - mean) * filled).square().sum(1, keepdim=True) / n).sqrt()
        limit = mean + self.sigmas * torch.maximum(deviation, LEAST_DEVIATION * mean.abs())
        step = torch.stack([loss, norm])[:, None]
        above = (step > limit) & finite & (2 * self.count >= size)
        enters = torch.where(above, limit, step)
        # In place, as all that a checkpoint holds: what hangs on the device must not have moved it.
        here = (self.slots == self.count % size) & finite
        self.values.copy_(torch.where(here, enters, self.values))
        self.count += finite
        return above.any()


class Ema:
    """Averages a model's parameters p over steps: average ← decay · average + (1 - decay) · p.

    It begins at the trainable parameters' present values, and is evaluated in their place.
    ``decay`` is in (0, 1); None: there is no average, and every method does nothing.

    Memory: one copy of the parameters, and another while the average is in use. Source: Polyak &
    Juditsky 1992; with exponential weights, as in Morales-Brotons et al. 2024 (arXiv:2411.18704).
    """

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self.decay = decay
        named = model.named_parameters() if decay else ()
        self._sources = {name: p.detach() for name, p in named if p.requires_grad}
        self.averages = {n: p.clone() for n, p in self._sources.items()}  # spread as they are
        self._local = [local_tensor(p) for p in self._sources.values()]
        self._local_averages = [local_tensor(p) for p in self.averages.values()]
        self._held: dict[str, Tensor] = {}  # the parameters, while the average is in use

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Take the parameters of the step just done into the average; never waits for the device.

        ``skipped``: a scalar on the device, 1 where no step was made and the average stays, else 0.
        """
        if self.decay is None:
            return
        weight = (1.0 - self.decay) * (1.0 - skipped)
        weights = [weight.to(average.dtype) for average in self._local_averages]
        torch._foreach_lerp_(self._local_averages, self._local, weights)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the model compute with the average; afterwards it has its parameters back.

        They are copied in place: compiled graphs know them by their addresses.
        """
        if self.decay is None or self._held:
            yield
            return
        self._held = {name: p.clone() for name, p in self._sources.items()}
        torch._foreach_copy_(self._local, self._local_averages)
        try:
            yield
        finally:
            torch._foreach_copy_(self._local, [local_tensor(p) for p in self._held.values()])
            self._held = {}

    def groups(self, model_state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return the groups ``model`` and, with an average, ``ema`` for a checkpoint, not copied.

        ``model_state`` is ``model.state_dict()``, which holds the average while that is in use.
        """
        groups = {"model": {**model_state, **self._held}}
        return groups if self.decay is None else groups | {"ema": self.averages}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Restore the average; of a run that had none it begins at the present parameters."""
        if self.averages and saved and saved.keys() != self.averages.keys():
            raise UserError("the checkpoint's average is of another model; unset train.ema_decay")
        sources = saved or self._sources
        with torch.no_grad():
            for name, average in self.averages.items():
                average.copy_(cut(sources[name], average))


class StepNumbers(NamedTuple):
    """A step as the host sees it: mean loss, gradient norm before clipping, verdict, fp16 scale."""

    loss: float
    norm: float
    verdict: int
    grad_scale: float = 1.0  # of the next step


class TrainStep:
    """The numbers of a run that live on the device, and the step that changes them.

    Args:
        criterion: of a custom model, which is compiled in there if at all; its batches have
            ``targets``. None: our Transformer's loss, compiled as ``run.compile`` says.
        n_micro: micro-batches of a step; None: as the config says.
        ignore_index: the target that does not count.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        config: TrainConfig,
        *,
        device: torch.device,
        world: World | None = None,
        criterion: Criterion | None = None,
        n_micro: int | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        self.world = world = world or World()
        self.model, self.optimizers = model, list(optimizers)
        self.precision = precision = resolve_precision(config.run.dtype, device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        run, loop, sharded = config.run, config.train, world.sharded
        self.max_grad_norm, self.max_grad_value = loop.max_grad_norm, loop.max_grad_value
        self.ema = Ema(model, loop.ema_decay)
        self.before_update: Callable[[], None] = lambda: None  # until then nothing has changed
        self.ignore_index = ignore_index
        self.judges = True  # False: every step is made, whatever its numbers are
        custom = criterion is not None
        self.criterion = criterion or default_criterion(config, scaled=precision.scaled)
        self.objective = nn.ModuleDict({"model": model})
        self.objective.forward = partial(self.criterion, model)
        self.compile_mode = "off" if custom else resolve_compile(config, device)
        self.loss_fn: Callable[..., Tensor] = self._loss
        self.n_micro = n_micro or step_shape(loop, config.data.seq_len, world.size).n_micro
        accumulates, mode = self.n_micro > 1, self.compile_mode
        captures = mode in ("cuda-graphs", "max-autotune")
        if accumulates and captures and world.mode == "ddp":
            other = "default" if mode == "cuda-graphs" else "max-autotune-no-cudagraphs"
            raise UserError(
                f"run.compile = {mode!r} does not accumulate gradients with distributed.mode = "
                "'ddp'; raise train.micro_batch until one makes the step, or use "
                f"run.compile={other}"
            )
        one_graph = mode == "cuda-graphs" or (custom and run.compile == "default")
        if sharded and (one_graph or run.fp8):
            raise UserError(
                f"run.compile = {run.compile!r} with run.fp8 = {run.fp8} does not go with "
                f"distributed.mode = {world.mode!r}; use distributed.mode=ddp, or run.compile="
                f"{'off' if custom else 'auto'} and run.fp8=false"
            )
        if sharded and mode not in ("off", "c++"):
            self.compile_mode = "blocks"  # a graph of everything cannot gather what it needs
        self.attention = resolve_attention(run.attention, device, deterministic=run.deterministic)
        # What gradients are taken of, by name: parameters, or copies of them (`_round_once`)
        self.copies: dict[str, Tensor] = {}
        named = self.objective.named_parameters()
        self.leaves: dict[str, Tensor] = {name: p for name, p in named if p.requires_grad}
        if isinstance(model, Transformer):
            if run.fp8:
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
        self.network: nn.Module = model
        alone = world.size == 1 and not custom
        if accumulates and alone and rounds_once(config, device, precision):
            self._round_once()
        # Gradients that are zeroed, not dropped. DDP's would lie beside its buckets until the last
        # micro-batch, and then in both; those of a CUDA graph in the graph's own pool, where the
        # next micro-batch overwrites them.
        outside = bool(self.copies) or (captures and not sharded)
        self.keeps_grads = accumulates and (world.mode == "ddp" or outside)
        for p in self.parameters if self.keeps_grads else ():
            p.grad = torch.zeros_like(p)
        if world.mode == "ddp":  # its module holds the model and returns the loss
            self.objective.forward = self.loss_fn
            self.network = self.loss_fn = replicate(self.objective, sync_buffers=custom)
        # Of the last step, fp32 scalars: mean over its target tokens, norm before clipping, verdict
        self.loss, self.norm, self.verdict = torch.zeros(3, device=device)
        # The `StepNumbers` of the steps since `numbers` was called, up to its last row
        self.history = torch.zeros(config.log.every_steps, len(StepNumbers._fields), device=device)
        self.n_unread = 0
        # What the gradients are multiples of: the number of targets that their loss sums over, or
        # in fp16, which has no exponents for that, `grad_scale`
        self.grad_unit = torch.ones((), device=device)
        # What the loss is multiplied by before the backward pass, and the clean steps since
        self.grad_scale = torch.full((), 2.0**16 if precision.scaled else 1.0, device=device)
        self.growth_tracker = torch.zeros((), dtype=torch.int32, device=device)
        self.window: SpikeWindow | None = None
        if loop.on_spike != "off":
            self.window = SpikeWindow(loop.spike_window_steps, loop.spike_sigmas, device)
        self.clock = StepClock(device, n_phases=2)
        time_collectives(self.network, world, self.clock, accumulates=accumulates)

    def _loss(self, *inputs: Any) -> Tensor:
        with self.precision.autocast():
            if self.copies:
                loss: Tensor = functional_call(self.objective, self.copies, inputs)
                return loss
            return self.criterion(self.model, *inputs)

    def _round_once(self) -> None:
        """Have a step round the blocks' matrices once for all of its micro-batches.

        The bits are those of autocast, which rounds each time, and widens each gradient.
        """
        dtype = self.precision.compute
        for name, p in self.leaves.items():
            if name.startswith("model.blocks.") and p.ndim == 2:
                self.copies[name] = torch.empty_like(p, dtype=dtype, requires_grad=True)
        self.leaves |= self.copies

    def __call__(self, batches: Sequence[Any], lr: float | None) -> None:
        """Run one step over its micro-batches with learning rate ``lr``; None: the optimizers'."""
        self.clock.mark(0)
        loss, grads = self._backward(batches)
        self.clock.mark(1)
        self._finish(*self._measure(loss, grads), grads, lr)

    def recheck(self, batches: Sequence[Any], lr: float | None) -> None:
        """As a call, but forward and backward run twice; no update is made where they differ.

        Loss, norm and gradients are compared bit for bit. Where they differ on any rank, a third
        time tells what happens once from what happens each time. Waits for the device.
        """
        self.clock.mark(0)
        rng, seen = rng_state(self.loss.device), list[list[int]]()
        for alike in (PERSISTENT, FINE, TRANSIENT):  # the verdict where it comes out as before
            if seen:
                restore_rng(rng, self.loss.device)
                self._drop_gradients()
            loss, grads = self._backward(batches)
            measured = self._measure(loss, grads)
            bits = torch.stack([*(checksum([t]) for t in measured), checksum(grads)]).tolist()
            found = max(self.world.gather(alike if bits in seen else PERSISTENT))
            if found == FINE:
                break
            seen.append(bits)
        self.clock.mark(1)
        self._finish(*measured, grads, lr, found)

    def _backward(self, batches: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
        """Run forward and backward; return this rank's part of the loss, and the gradients."""
        counts = [(b.targets != self.ignore_index).sum() for b in batches]
        n_targets = counts[0] if len(counts) == 1 else torch.stack(counts).sum()
        counted = self.world.begin_sum(n_targets)  # of all ranks, whose gradients are averaged
        loss, weight = torch.zeros_like(self.loss), None
        if self.copies:
            with torch.no_grad():
                sources = map(self.objective.get_parameter, self.copies)
                torch._foreach_copy_([*self.copies.values()], [*sources])
        for n_left, batch in zip(reversed(range(len(batches))), batches, strict=True):
            set_gradient_sync(self.network, self.world, sync=n_left == 0)
            ours = isinstance(batch, Batch)
            inputs = (batch.tokens, batch.targets, batch.doc_starts) if ours else (batch,)
            part = self.loss_fn(*inputs)
            if self.precision.scaled and weight is None:
                counted()
                weight = self.grad_scale * self.world.size / n_targets.clamp(min=1)
            if self.keeps_grads and self.world.mode != "ddp":
                new = torch.autograd.grad(part, [*self.leaves.values()], weight)
                pairs = [*zip(self.parameters, new, strict=True)]
                for dtype in {grad.dtype for grad in new}:  # few launches for those in fp32
                    alike = [(p.grad, grad) for p, grad in pairs if grad.dtype == dtype]
                    torch._foreach_add_(*map(list, zip(*alike, strict=True)))
            else:
                part.backward(weight)  # type: ignore[no-untyped-call]
            loss += part.detach()
        counted()
        n_targets = n_targets.clamp(min=1)
        self.grad_unit = self.grad_scale if self.precision.scaled else n_targets / self.world.size
        return loss / n_targets, [p.grad for p in self.parameters if p.grad is not None]

    def _finish(
        self, loss: Tensor, norm: Tensor, grads: list[Tensor], lr: float | None, found: int = FINE
    ) -> None:
        """Judge the step and update; ``found`` is what `recheck` has found."""
        self.loss, self.norm = loss, norm
        self.before_update()
        self.verdict = verdict = self._judge() if found == FINE else torch.full_like(loss, found)
        bad = (verdict != FINE).float()
        clip = 1 / self.grad_unit
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
                step(clip_coefficient=clip, found_inf=bad)
            elif not self.judges or not bad:  # any other optimizer costs a host sync to be judged
                found_grads = (p.grad for p in parameters_of(optimizer))
                if mine := [local_tensor(g) for g in found_grads if g is not None]:
                    torch._foreach_mul_(mine, clip)
                step()
            self._drop_gradients(optimizer)
        self.ema.update(skipped=bad)
        if self.precision.scaled:  # halve after an overflow, double after 2,000 clean steps
            inf = torch.where(verdict >= SPIKE, 0.0, bad)
            torch._amp_update_scale_(self.grad_scale, self.growth_tracker, inf, 2.0, 0.5, 2000)
        row = min(self.n_unread, len(self.history) - 1)
        # In the order of `StepNumbers`
        self.history[row] = torch.stack([self.loss, self.norm, verdict, self.grad_scale])
        self.n_unread = row + 1
        self.clock.mark(2)

    def _drop_gradients(self, *of: torch.optim.Optimizer) -> None:
        """Drop, or zero, the gradients of some optimizers, of all where none is named."""
        for optimizer in of or self.optimizers:
            if self.keeps_grads:
                optimizer.zero_grad(set_to_none=False)
            else:  # as zero_grad does, in a quarter of its 0.1 ms
                for p in parameters_of(optimizer):
                    p.grad = None

    def _measure(self, loss: Tensor, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the step's loss and gradient norm, alike on all ranks, from `_backward`'s."""
        world = self.world
        if world.sharded:
            sums = torch.stack([loss, grad_norm(grads).norm.square()])
            loss, squares = world.sum(sums).unbind()
            return loss, (squares / world.n_copies).sqrt() / self.grad_unit
        summed = world.begin_sum(loss)
        norm = grad_norm(grads).norm
        summed()
        return loss, norm / self.grad_unit

    def _judge(self) -> Tensor:
        """Return the verdict on this step, an fp32 scalar."""
        if not self.judges:
            return torch.zeros_like(self.loss)
        finite = torch.isfinite(self.loss + self.norm)
        verdict = torch.where(finite, float(FINE), float(NONFINITE))
        if self.precision.scaled:
            overflow = torch.isfinite(self.loss) & ~finite & (self.grad_scale > 1)
            verdict = torch.where(overflow, float(OVERFLOW), verdict)
        if self.window is not None:
            spike = self.window.judge(self.loss, self.norm, finite)
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
