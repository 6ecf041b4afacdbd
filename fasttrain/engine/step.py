"""One training step on the device: forward, backward, norm, verdict, update.

Nothing here waits for the device, except a recheck, an optimizer that cannot read the verdict on
the device, and `TrainStep.numbers`.

The loss of a step is the sum over all its target tokens divided by the number of those not ignored,
so that neither loss nor gradient depends on how the step is cut into micro-batches and over ranks.
That number is known before the first forward pass and goes into the loss, so every gradient,
including one that a hook sees, is a gradient of the mean. Ranks reduce gradients only with the last
micro-batch, and then what they judge the step by, in one small reduction: all ranks reach the same
verdict.

A step owns its gradients. It begins without any, and it judges, clips and applies those of the
parameters that train at that moment: they require a gradient, and an optimizer holds them.

Legend: B micro-batch rows, T sequence, D dim, V vocabulary.
"""

import gc
from collections.abc import Callable, Sequence
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
from fasttrain.engine.gradients import Gradients
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
    """Return the loss of our Transformer. If ``scaled``, its incoming gradient need not be 1."""
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


class Computed(NamedTuple):
    """What the forward and backward passes of a step have given; nothing is updated yet."""

    loss: Tensor  # mean over the step's targets, alike on all ranks
    norm: Tensor  # of the gradients, before clipping, alike on all ranks
    gradients: Sequence[Tensor]  # multiples of `TrainStep.grad_scale`
    outcome: int = FINE  # or what a recheck found: TRANSIENT, PERSISTENT


class TrainStep:
    """The numbers of a run that live on the device, and the step that changes them.

    Calling it runs a whole step: `compute`, which only reads the state, and `update`.

    Args:
        model: The model, on the device and sharded as ``resolved.world`` says.
        optimizers: Of the model's parameters; those of other parameters are stepped too.
        resolved: The settings of the run, for its device and its ranks.
        criterion: The loss of a custom model, whose batches have ``targets``. If that model is
            compiled, it is compiled inside the criterion. None: our Transformer's loss, compiled
            as ``run.compile`` says.
        n_micro: Micro-batches of a step, of a custom model; None: as the config says.
        ignore_index: The target that does not count.
        count: Given one batch, returns its share of the divisor of the step's loss: a number if the
            host knows it, else a scalar on the device. None: the number of targets that count.
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
        config = resolved.config
        # What is trained, and how it is updated
        self.world = resolved.world
        self.model = model
        self.optimizers = list(optimizers)
        self.max_grad_norm = config.train.max_grad_norm
        self.max_grad_value = config.train.max_grad_value
        self.ema = Ema(model, config.train.ema_decay)
        self.judges = True  # False: every step is made, whatever its numbers are

        # The loss of a micro-batch
        self.precision = resolved.precision
        self.attention = resolved.attention
        self.ignore_index = ignore_index
        self.count = count or self._count
        self._is_custom = criterion is not None
        self.criterion = criterion or default_criterion(config, scaled=self.precision.scaled)
        self.objective = nn.ModuleDict({"model": model})
        self.objective.forward = partial(self.criterion, model)
        # A custom model is compiled by itself, if at all: not with the loss
        self.compile_mode = "off" if self._is_custom else resolved.compile_mode
        self.loss_fn: Callable[..., Tensor] = self._prepare_loss(resolved)
        # The loss of this rank alone, before any reduction; DDP's module wraps it
        self._loss_of_rank = self.loss_fn
        if n_micro is None:
            assert resolved.shape is not None
            n_micro = resolved.shape.n_micro
        self.n_micro = n_micro

        # Its gradients, and their reduction over ranks
        self.clock = StepClock(resolved.device, n_phases=2)
        self.gradients = self._make_gradients(resolved)
        # What reduces gradients: the model itself, or its DDP wrapper
        self.network: nn.Module = model
        self._replicated: list[int] = []  # the parameters that DDP reduces gradients of
        self._begin()
        time_collectives(self.network, self.world, self.clock, accumulates=n_micro > 1)

        # The numbers of the last steps
        on_device: Any = {"dtype": torch.float32, "device": resolved.device}
        self.loss = torch.zeros((), **on_device)
        self.norm = torch.zeros((), **on_device)
        self.verdict = torch.zeros((), **on_device)
        # The `StepNumbers` of the steps since `numbers` was called; when it is full, the newest
        # step overwrites the last row
        self.history = torch.zeros(config.log.every_steps, len(StepNumbers._fields), **on_device)
        self.n_unread = 0
        # Whether the step has targets on any rank, and whether on this one (None: the host does
        # not know)
        self.has_targets = torch.ones((), dtype=torch.bool, device=resolved.device)
        self._known_targets: bool | None = None
        # The loss scale, which gradients are multiplied by in fp16 because its range is narrow; and
        # the steps since it last changed
        self.grad_scale = torch.full((), 2.0**16 if self.precision.scaled else 1.0, **on_device)
        self.growth_tracker = torch.zeros((), dtype=torch.int32, device=resolved.device)
        self.window: SpikeWindow | None = None
        if config.train.on_spike != "off":
            n_steps = config.train.spike_window_steps
            self.window = SpikeWindow(n_steps, config.train.spike_sigmas, resolved.device)

    # ---- how it is made ------------------------------------------------------------------------

    def _prepare_loss(self, resolved: Resolved) -> Callable[..., Tensor]:
        """Set how our Transformer computes; return the loss of a micro-batch, perhaps compiled."""
        config = resolved.config
        if isinstance(self.model, Transformer):
            if config.run.fp8:
                multiply_in_fp8(self.model, resolved.device)
            prepare_blocks(
                self.model,
                activation_checkpointing=config.train.activation_checkpointing,
                mode=self.compile_mode,
                sharded=self.world.sharded,
                dtype=self.precision.compute,
            )
        if self.compile_mode in ("off", "c++", "blocks"):
            return self._loss
        return compile_function(self._loss, self.compile_mode, has_bias=config.model.bias)

    def _make_gradients(self, resolved: Resolved) -> Gradients:
        """Choose where the gradients of a step's micro-batches add up."""
        is_ddp = self.world.mode == "ddp"
        captures_graphs = self.compile_mode in ("cuda-graphs", "max-autotune")
        rounds_once = resolved.rounds_once and not self._is_custom
        accumulates = self.n_micro > 1
        outside_autograd = rounds_once or (captures_graphs and not self.world.sharded)
        # A custom model may leave some parameters unused. With a gradient of zero they would still
        # be decayed, so its gradients are dropped, not zeroed.
        kept = accumulates and ((is_ddp and not self._is_custom) or outside_autograd)
        return Gradients(
            self.objective,
            kept=kept,
            added_here=kept and not is_ddp,
            rounded_to=self.precision.compute if rounds_once else None,
        )

    def _count(self, batch: Any) -> Tensor:
        n_targets: Tensor = (batch.targets != self.ignore_index).sum()
        return n_targets

    def _loss(self, *inputs: Any) -> Tensor:
        with self.precision.autocast():
            if self.gradients.copies:
                loss: Tensor = functional_call(self.objective, self.gradients.copies, inputs)
                return loss
            return self.criterion(self.model, *inputs)

    def _replicate(self, requiring_grad: list[int]) -> None:
        """Wrap the model in DDP, anew where other parameters require a gradient than before.

        DDP's module holds the model and returns the loss.
        """
        if self._replicated == requiring_grad:
            return
        again = bool(self._replicated)
        if again:  # free the old module first: two must not reduce the same gradients
            self.network = self.model
            self.loss_fn = self._loss_of_rank
            gc.collect()
        self._replicated = requiring_grad
        self.objective.forward = self._loss_of_rank
        self.network = self.loss_fn = replicate(self.objective, custom=self._is_custom)
        if again:
            accumulates = self.n_micro > 1
            time_collectives(self.network, self.world, self.clock, accumulates=accumulates)

    # ---- a step --------------------------------------------------------------------------------

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that train: they require a gradient, and an optimizer holds them."""
        return self.gradients.parameters

    def __call__(self, batches: Sequence[Any], lr: float | None, *, recheck: bool = False) -> None:
        """Run one step over its micro-batches with learning rate ``lr``; None: the optimizers'."""
        self.update(self.compute(batches, recheck=recheck), lr)

    def compute(self, batches: Sequence[Any], *, recheck: bool = False) -> Computed:
        """Run forward and backward; parameters, moments and the step's numbers stay as they are.

        Args:
            batches: The micro-batches of this rank.
            recheck: Run them twice, and compare loss, norm and gradients bit for bit. If they
                differ on any rank, a third run tells a fault that happened once from one that
                happens each time, and `update` makes no update. Waits for the device.
        """
        self._begin()
        if not self.parameters:
            raise UserError(
                "train: no parameter that the optimizer holds requires a gradient, so that nothing "
                "would be trained; unfreeze some with requires_grad_()"
            )
        try:
            self.clock.mark(0)
            computed = self._compute_again(batches) if recheck else self._compute(batches)
            self.clock.mark(1)
        except BaseException:
            self.gradients.drop()
            raise
        return computed

    def update(self, computed: Computed, lr: float | None) -> None:
        """Judge the step, clip, update unless it is bad, and keep its numbers; drop gradients."""
        try:
            self.loss = computed.loss
            self.norm = computed.norm
            if computed.outcome == FINE:
                self.verdict = self._judge()
            else:
                self.verdict = torch.full_like(self.loss, computed.outcome)
            is_bad = (self.verdict != FINE).float()
            self._update_parameters(computed.gradients, is_bad, lr)
            self.ema.update(skipped=is_bad)
            if self.precision.scaled:
                # Halve after numbers that are not finite, double after 2,000 other steps
                inf = torch.where(self.verdict >= SPIKE, 0.0, is_bad)
                torch._amp_update_scale_(self.grad_scale, self.growth_tracker, inf, 2.0, 0.5, 2000)
            self._note_numbers()
            self.clock.mark(2)
        finally:
            self.gradients.drop()

    def _begin(self) -> None:
        """Begin without gradients, with the parameters that train now."""
        if self.gradients.find_parameters(self.optimizers):
            self.ema.follow(self.parameters)
        if self.world.mode == "ddp":
            self._replicate([id(p) for p in self.model.parameters() if p.requires_grad])
        self.gradients.drop()
        if self.world.sharded:
            drop_unreduced_gradients(self.model)

    def _compute(self, batches: Sequence[Any]) -> Computed:
        loss, gradients = self._backward(batches)
        loss, norm = self._measure(loss, gradients)
        return Computed(loss, norm, gradients)

    def _compute_again(self, batches: Sequence[Any]) -> Computed:
        """Compute two or three times from the same random state; see `compute`."""
        device = self.loss.device
        rng = rng_state(device)
        earlier: list[list[int]] = []  # the bits of each earlier run's results
        # What the first, second and third run mean if an earlier run gave the same bits. The first
        # has no earlier one.
        for outcome_if_alike in (PERSISTENT, FINE, TRANSIENT):
            if earlier:
                restore_rng(rng, device)
                self.gradients.drop()
            computed = self._compute(batches)
            parts = [[computed.loss], [computed.norm], computed.gradients]
            bits = torch.stack([checksum(part) for part in parts]).tolist()
            outcome = outcome_if_alike if bits in earlier else PERSISTENT
            outcome = max(self.world.gather(outcome))  # the worst of all ranks
            if outcome == FINE:
                break
            earlier.append(bits)
        return computed._replace(outcome=outcome)

    def _backward(self, batches: Sequence[Any]) -> tuple[Tensor, Sequence[Tensor]]:
        """Run forward and backward; return this rank's part of the loss, and the gradients.

        Each rank's gradients are multiplied by `grad_scale`; the reduction takes their mean.
        """
        n_targets = self._count_targets(batches)
        wait_for_sum = self.world.begin_sum(n_targets)
        loss = torch.zeros_like(self.loss)
        self.gradients.round_copies()
        wait_for_sum()  # from here on, n_targets is the sum over all ranks
        self.has_targets = n_targets > 0
        unit = self.grad_scale * self.world.size
        scale = unit / torch.where(self.has_targets, n_targets, 1)
        for n_left, batch in zip(reversed(range(len(batches))), batches, strict=True):
            set_gradient_sync(self.network, self.world, sync=n_left == 0)
            is_ours = isinstance(batch, Batch)
            inputs = (batch.tokens, batch.targets, batch.doc_starts) if is_ours else (batch,)
            part = self.loss_fn(*inputs, scale)
            self.gradients.backward(part)
            loss += part.detach()
        return loss / unit, self.gradients.tensors()

    def _count_targets(self, batches: Sequence[Any]) -> Tensor:
        """Return what the loss of this rank's batches is divided by, an fp32 scalar."""
        counts = [self.count(batch) for batch in batches]
        known = [count for count in counts if not isinstance(count, Tensor)]
        self._known_targets = any(known) if len(known) == len(counts) else None
        if self._known_targets is not None:  # a fill, which waits for nothing
            return torch.full_like(self.loss, sum(known))
        totals = [torch.as_tensor(count, device=self.loss.device) for count in counts]
        return (totals[0] if len(totals) == 1 else torch.stack(totals).sum()).float()

    def _update_parameters(
        self, gradients: Sequence[Tensor], is_bad: Tensor, lr: float | None
    ) -> None:
        """Step the optimizers on clipped gradients, unless the step ``is_bad`` (1, else 0)."""
        clip = 1 / self.grad_scale
        if self.max_grad_norm is not None:
            clip = clip * torch.clamp(self.max_grad_norm / (self.norm + 1e-6), max=1.0)
        if self.max_grad_value is not None:  # of what the optimizers will see, times clip
            limit = self.max_grad_value / clip
            for gradient in gradients:
                local_tensor(gradient).clamp_(-limit, limit)
        for optimizer in self.optimizers:
            step: Any = optimizer.step
            if lr is not None:
                set_lr(optimizer, lr)
            if getattr(optimizer, "reads_clip_on_device", False):
                if has_step_hooks(optimizer):
                    _scale_gradients(optimizer, clip)
                    step(found_inf=is_bad)
                else:
                    step(clip_coefficient=clip, found_inf=is_bad)
            elif self._makes_update(is_bad):
                _scale_gradients(optimizer, clip)
                step()

    def _note_numbers(self) -> None:
        """Keep this step's `StepNumbers` on the device, until `numbers` is called."""
        row = min(self.n_unread, len(self.history) - 1)
        self.history[row] = torch.stack([self.loss, self.norm, self.verdict, self.grad_scale])
        self.n_unread = row + 1

    def _makes_update(self, is_bad: Tensor) -> bool:
        """Return whether to step an optimizer that cannot read the verdict on the device.

        That waits for the device. If steps are not judged, only a step without targets is skipped,
        so it waits only when the host knows that this rank has none. If only a GPU knows, it does
        not wait, and the optimizer steps.
        """
        if not self.judges and (
            self._known_targets or (self._known_targets is None and is_bad.is_cuda)
        ):
            return True
        return not is_bad

    def _measure(self, loss: Tensor, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the step's loss and gradient norm, alike on all ranks, from `_backward`'s."""
        world = self.world
        if world.sharded:
            sums = torch.stack([loss, grad_norm(gradients).norm.square()])
            loss, squares = world.sum(sums).unbind()
            return loss, (squares / world.n_copies).sqrt() / self.grad_scale
        wait_for_sum = world.begin_sum(loss)
        norm = grad_norm(gradients).norm
        wait_for_sum()  # from here on, loss is the sum over all ranks
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
        self.n_unread = 0  # only after the sync, during which another thread may call this
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
