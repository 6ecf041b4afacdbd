"""Loss spikes, judged on the device: is this step far above the ones before it?

A step is a spike where its loss or its gradient norm lies more than k standard deviations above the
mean of a window of the last steps. Three things keep the window honest. What is not finite never
enters it. A spike enters as the limit that it passed, so that one of 10⁶ does not hide the next,
and a level that rose for good is accepted after a while. And the deviation counts as at least
`LEAST_DEVIATION` of the mean, so that a loss that hardly varies is no row of spikes.

Everything is tensors of a fixed size: no step waits for the device to be judged.

Legend: W steps of the window; row 0 the loss, row 1 the gradient norm.
"""

import torch
from torch import Tensor

__all__ = ["SpikeWindow"]

LEAST_DEVIATION = 0.01


class SpikeWindow:
    """The last steps' losses and gradient norms.

    Args:
        n_steps: W. Nothing is a spike before half of the window is filled.
        sigmas: k.
        device: where losses and norms are.

    Attributes:
        values: fp32 (2, W), a ring; zero where not yet filled.
        count: int64 scalar, how many steps have entered.
    """

    def __init__(self, n_steps: int, sigmas: float, device: torch.device) -> None:
        self.sigmas = sigmas
        self.slots = torch.arange(n_steps, device=device)
        self.values = torch.zeros(2, n_steps, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)

    def judge(self, loss: Tensor, norm: Tensor, finite: Tensor) -> Tensor:
        """Return whether this step is a spike, and take it into the window.

        Args:
            loss: fp32 scalar.
            norm: fp32 scalar.
            finite: bool scalar, whether both are; if not, it is no spike and stays out.

        Returns:
            bool scalar on the device.
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
