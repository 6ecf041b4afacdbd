"""Whether a step is a spike, judged on the device."""

import torch
from torch import Tensor

LEAST_DEVIATION = 0.01  # of a spike window, as a part of its mean


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
        self.values = torch.zeros(2, n_steps, dtype=torch.float32, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)  # steps that have entered

    def judge(self, loss: Tensor, norm: Tensor, counts: Tensor) -> Tensor:
        """Return whether this step is a spike, and take it into the window if it ``counts``.

        A step counts if it is finite and has targets. All are scalars on the device.
        """
        size = len(self.slots)
        filled = self.slots < self.count
        n = self.count.clamp(1, size)
        mean = self.values.sum(1, keepdim=True) / n  # (2, 1)
        deviation = (((self.values - mean) * filled).square().sum(1, keepdim=True) / n).sqrt()
        limit = mean + self.sigmas * torch.maximum(deviation, LEAST_DEVIATION * mean.abs())
        step = torch.stack([loss, norm])[:, None]
        above = (step > limit) & counts & (2 * self.count >= size)
        enters = torch.where(above, limit, step)
        # In place, as all that a checkpoint holds: what hangs on the device must not have moved it.
        here = (self.slots == self.count % size) & counts
        self.values.copy_(torch.where(here, enters, self.values))
        self.count += counts
        return above.any()
