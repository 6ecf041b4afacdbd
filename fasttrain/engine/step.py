"""One training step on the device: forward, backward, norm, verdict, update. Nothing here syncs.

The loss of a step is the sum over all its target tokens divided by the number of those not ignored,
so that neither loss nor gradient depends on how the step is cut into micro-batches and over ranks.
Ranks reduce gradients with the last micro-batch alone, and after it loss and norm, in one small
reduction: what they judge a step by is the same, and so is the verdict.

Legend: B micro-batch rows, T sequence, D dim, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from fasttrain_kernels import grad_norm, linear_cross_entropy
from fasttrain_kernels.grad_norm import local_tensor
from torch import Tensor, nn
from torch.distributed import Work

from fasttrain.config import TrainConfig, UserError
from fasttrain.data.loader import Batch
from fasttrain.device import Precision
from fasttrain.distributed.sharding import replicate, set_gradient_sync, time_collectives
from fasttrain.distributed.world import World, checksum
from fasttrain.engine.ema import Ema
from fasttrain.engine.optim import set_lr
from fasttrain.engine.schedule import step_shape
from fasttrain.engine.spikes import SpikeWindow
from fasttrain.engine.state import restore_rng, rng_state
from fasttrain.log.timing import StepClock
from fasttrain.model.runtime import (
    compile_function,
    multiply_in_fp8,
    prepare_blocks,
    resolve_compile,
)
from fasttrain.model.transformer import Transformer

IGNORE_INDEX = -100
# The verdict on a step; all but the first make no update. An overflow is an fp16 gradient that a
# smaller scale may still hold. Of a step that was run again and came out otherwise, a third time
# agreed with one before (transient), or with none.
FINE, OVERFLOW, NONFINITE, SPIKE, TRANSIENT, PERSISTENT = range(6)

# model, tokens, targets, doc_starts → summed loss; of other batches: model, batch → summed loss
Criterion = Callable[..., Tensor]


def linear_cross_entropy_criterion(config: TrainConfig) -> Criterion:
    """Return the default criterion: head and cross-entropy as one operation, summed over tokens."""

    def criterion(
        model: Transformer, tokens: Tensor, targets: Tensor, doc_starts: Tensor | None
    ) -> Tensor:
        hidden = model.hidden(tokens, doc_starts=doc_starts)
        loss_sum = linear_cross_entropy(
            hidden,
            model.head_weight,
            targets,
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            label_smoothing=config.train.label_smoothing,
            z_loss=config.train.z_loss,
            softcap=model.config.logit_softcap,
        )
        assert isinstance(loss_sum, Tensor)
        return loss_sum

    return criterion


class StepNumbers(NamedTuple):
    """A step as the host sees it: mean loss, gradient norm before clipping, verdict."""

    loss: float
    norm: float
    verdict: int


class Numbers(NamedTuple):
    """What `TrainStep.numbers` brings to the host of the steps since it was last asked."""

    steps: list[StepNumbers]
    grad_scale: float
    forward_backward_s: float
    optimizer_s: float
    communication_s: float


class _Objective(nn.Module):
    """The loss as a module that holds the model: DDP hooks into both."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *inputs: Any) -> Tensor:
        return self.loss(*inputs)


def _inputs(batch: Any) -> tuple[Any, ...]:
    """Return what of a batch the criterion takes."""
    ours = isinstance(batch, Batch)
    return (batch.tokens, batch.targets, batch.doc_starts) if ours else (batch,)


class TrainStep:
    """The numbers of a run that live on the device, and the step that changes them.

    Args:
        criterion: of a custom model, which is compiled in there if at all; its batches have
            ``targets``. None: our Transformer's loss, compiled as ``run.compile`` says.
        n_micro: micro-batches of a step; None: as the config says.
        ignore_index: the target that does not count.
        judges: False: every step is made, whatever its numbers are.

    Attributes:
        verdict: fp32 scalar of the last step.
        loss: fp32 scalar, mean over the target tokens of the last step.
        norm: fp32 scalar, gradient norm of the last step before clipping.
        history: fp32 (3, ``log.every_steps``), loss, norm and verdict of the steps since `numbers`
            was last called; beyond its end the last column is written again.
        grad_scale: what the loss is multiplied by before the backward pass: 1 unless fp16.
        growth_tracker: clean steps since the scale last changed.
        window: what a spike is judged by; None where spikes are not looked for.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        config: TrainConfig,
        *,
        device: torch.device,
        precision: Precision,
        world: World | None = None,
        criterion: Criterion | None = None,
        n_micro: int | None = None,
        ignore_index: int = IGNORE_INDEX,
        judges: bool = True,
    ) -> None:
        self.model = model
        self.world = world = world or World()
        self.optimizers = list(optimizers)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.precision = precision
        self.max_grad_norm = config.train.max_grad_norm
        self.max_grad_value = config.train.max_grad_value
        self.ema = Ema(model, config.train.ema_decay)
        self.before_update: Callable[[], None] = lambda: None  # until then nothing has changed
        self.ignore_index, self.judges = ignore_index, judges
        custom = criterion is not None
        self.criterion = criterion or linear_cross_entropy_criterion(config)
        self.compile_mode = "off" if custom else resolve_compile(config, device)
        self.loss_fn: Callable[..., Tensor] = self._loss
        if n_micro is None:
            n_micro = step_shape(config.train, config.data.seq_len, world.size).n_micro
        accumulates = n_micro > 1
        if accumulates and self.compile_mode in ("cuda-graphs", "max-autotune"):
            # A graph's gradients live in its own pool: the next micro-batch overwrites them.
            other = {"cuda-graphs": "default"}.get(self.compile_mode, "max-autotune-no-cudagraphs")
            raise UserError(
                f"run.compile = {self.compile_mode!r} does not accumulate gradients; raise "
                f"train.micro_batch until one makes the step, or use run.compile={other}"
            )
        if world.sharded and self.compile_mode not in ("off", "c++"):
            # A graph cannot gather what it needs.
            if self.compile_mode == "cuda-graphs":
                raise UserError(
                    "run.compile = 'cuda-graphs' cannot gather the parameters of "
                    f"distributed.mode = {world.mode!r}; use run.compile=auto"
                )
            self.compile_mode = "blocks"
        if custom and world.sharded and config.run.compile == "default":
            raise UserError(
                f"run.compile = 'default' does not go with distributed.mode = {world.mode!r} here; "
                "use distributed.mode=ddp, or run.compile=off"
            )
        if config.run.fp8 and world.sharded:
            raise UserError(
                f"run.fp8 = true does not go with distributed.mode = {world.mode!r}; use "
                "distributed.mode=ddp, or run.fp8=false"
            )
        if isinstance(model, Transformer):
            if config.run.fp8:
                multiply_in_fp8(model, device)
            prepare_blocks(
                model,
                activation_checkpointing=config.train.activation_checkpointing,
                mode=self.compile_mode,
                sharded=world.sharded,
                dtype=precision.compute,
            )
        if self.compile_mode not in ("off", "c++", "blocks"):
            self.loss_fn = compile_function(self._loss, self.compile_mode)
        self.network: nn.Module = model
        self.keeps_grads = world.mode == "ddp" and accumulates
        if world.mode == "ddp":
            objective = _Objective(model, self.loss_fn)
            ddp = replicate(objective, accumulates=accumulates, sync_buffers=custom)
            self.network = self.loss_fn = ddp
        zero = torch.zeros((), device=device)
        self.loss, self.norm, self.verdict = zero.clone(), zero.clone(), zero.clone()
        self.history = torch.zeros(3, config.log.every_steps, device=device)
        self.n_unread = 0
        self.grad_scale = torch.full_like(zero, 2.0**16 if precision.scaled else 1.0)
        self.growth_tracker = torch.zeros((), dtype=torch.int32, device=device)
        self.window: SpikeWindow | None = None
        if config.train.on_spike != "off":
            loop = config.train
            self.window = SpikeWindow(loop.spike_window_steps, loop.spike_sigmas, device)
        self.clock = StepClock(device, n_phases=2)
        time_collectives(self.network, world, self.clock, accumulates=accumulates)

    def _loss(self, *inputs: Any) -> Tensor:
        with self.precision.autocast():
            return self.criterion(self.model, *inputs)

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
        for most in (2, 3):
            while len(seen) < most:
                if seen:
                    restore_rng(rng, self.loss.device)
                    self._drop_gradients()
                loss, grads = self._backward(batches)
                measured = self._measure(loss, grads)
                bits = [checksum([tensor]) for tensor in measured] + [checksum(grads)]
                seen.append(torch.stack(bits).tolist())
            found = FINE if seen[0] == seen[1] else PERSISTENT
            if most == 3:
                found = TRANSIENT if seen[2] in seen[:2] else PERSISTENT
            found = max(self.world.gather(found))
            if found == FINE:
                break
        self.clock.mark(1)
        self._finish(*measured, grads, lr, found)

    def _backward(self, batches: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
        """Run forward and backward; return this rank's weighted loss, and the gradients."""
        counts = [(b.targets != self.ignore_index).sum() for b in batches]
        n_targets = counts[0] if len(counts) == 1 else torch.stack(counts).sum()
        counting = self.world.begin_sum(n_targets)
        weight = loss = None
        for n_left, batch in zip(reversed(range(len(batches))), batches, strict=True):
            set_gradient_sync(self.network, self.world, sync=n_left == 0)
            part = self.loss_fn(*_inputs(batch))
            if weight is None:
                weight = self._weight(n_targets, counting)
            weighted = part.detach() * weight
            loss = weighted if loss is None else loss + weighted
            part.backward(weight)  # type: ignore[no-untyped-call]
        assert loss is not None
        return loss, [p.grad for p in self.parameters if p.grad is not None]

    def _finish(
        self, loss: Tensor, norm: Tensor, grads: list[Tensor], lr: float | None, found: int = FINE
    ) -> None:
        """Judge the step and update; ``found`` is what `recheck` has found."""
        self.loss, self.norm = loss, norm
        self.before_update()
        verdict = self._judge() if found == FINE else torch.full_like(loss, float(found))
        self.verdict = verdict
        bad = (verdict != FINE).float()
        clip = 1 / self.grad_scale
        if self.max_grad_norm is not None:
            clip = clip * torch.clamp(self.max_grad_norm / (self.norm + 1e-6), max=1.0)
        if self.max_grad_value is not None:  # of what the optimizers will see, times clip
            limit = self.max_grad_value / clip
            for grad in grads:
                local_tensor(grad).clamp_(-limit, limit)
        for optimizer in self.optimizers:
            if lr is not None:
                set_lr(optimizer, lr)
            self._update(optimizer, clip, bad)
            self._drop_gradients(optimizer)
        self.ema.update(skipped=bad)
        if self.precision.scaled:  # halve after an overflow, double after 2,000 clean steps
            inf = torch.where(verdict >= SPIKE, 0.0, bad)
            torch._amp_update_scale_(self.grad_scale, self.growth_tracker, inf, 2.0, 0.5, 2000)
        column = min(self.n_unread, self.history.shape[1] - 1)
        self.history[:, column] = torch.stack([self.loss, self.norm, verdict])
        self.n_unread = column + 1
        self.clock.mark(2)

    def _drop_gradients(self, *of: torch.optim.Optimizer) -> None:
        """Drop, or zero, the gradients of some optimizers, of all where none is named."""
        for optimizer in of or self.optimizers:
            if self.keeps_grads:
                optimizer.zero_grad(set_to_none=False)
            else:  # as zero_grad does, in a quarter of its 0.1 ms
                for p in (p for group in optimizer.param_groups for p in group["params"]):
                    p.grad = None

    def _weight(self, n_targets: Tensor, counting: Work | None) -> Tensor:
        """Return what a summed loss is multiplied by; ``counting`` adds targets up over ranks."""
        if counting is None:
            return self.grad_scale / n_targets.clamp(min=1)
        counting.wait()
        return self.grad_scale * self.world.size / n_targets.clamp(min=1)

    def _measure(self, loss: Tensor, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss and the gradient norm of the step, alike on all ranks.

        Args:
            loss: of this rank's micro-batches, weighted.
            grads: averaged over ranks; shards are of this rank.
        """
        world = self.world
        reduced = world.begin_sum(loss) if world.mode == "ddp" else None
        norm = grad_norm(grads).norm
        if reduced is not None:
            reduced.wait()
        if world.sharded:
            loss, squares = world.sum(torch.stack([loss, norm.square()])).unbind()
            norm = (squares / world.n_copies).sqrt()
        scale = self.grad_scale
        return (loss / scale if world.size == 1 else loss / (scale * world.size)), norm / scale

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

    def _update(self, optimizer: torch.optim.Optimizer, clip: Tensor, bad: Tensor) -> None:
        step: Any = optimizer.step
        if getattr(optimizer, "reads_clip_on_device", False):
            step(clip_coefficient=clip, found_inf=bad)
        elif not self.judges or not bad:  # any other optimizer costs a host sync to be judged
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            if grads := [local_tensor(g) for g in grads if g is not None]:
                torch._foreach_mul_(grads, clip)
            step()

    def numbers(self) -> Numbers:
        """Bring the numbers of the steps since the last call to the host: one sync."""
        n = self.n_unread
        flat = torch.cat([self.history[:, :n].flatten(), self.grad_scale[None]]).tolist()
        self.n_unread = 0  # not before: while this thread waits, another may ask
        rows = (flat[i * n : (i + 1) * n] for i in range(3))
        steps = [StepNumbers(loss, norm, int(v)) for loss, norm, v in zip(*rows, strict=True)]
        return Numbers(steps, flat[-1], *self.clock.read())

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that resuming needs."""
        tensors = {"grad_scale": self.grad_scale, "growth_tracker": self.growth_tracker}
        if self.window is not None:
            tensors |= {"spike_values": self.window.values, "spike_count": self.window.count}
        return tensors

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned; a window of another size begins empty."""
        device = self.loss.device
        self.n_unread = 0
        self.grad_scale = state["grad_scale"].to(device, copy=True)
        self.growth_tracker = state["growth_tracker"].to(device, copy=True)
        if self.window is not None:
            values, count = self.window.values, self.window.count
            fits = "spike_count" in state and state["spike_values"].shape == values.shape
            self.window.values = (
                state["spike_values"].to(device, copy=True) if fits else torch.zeros_like(values)
            )
            self.window.count = (
                state["spike_count"].to(device, copy=True) if fits else torch.zeros_like(count)
            )
