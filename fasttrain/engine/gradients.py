"""The gradients of a step: which parameters have one, and where micro-batches add them up."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fasttrain.engine.optim import parameters_of


class Gradients:
    """The gradients of the parameters that train, from the start of a step to its update.

    A parameter trains if it requires a gradient and an optimizer holds it. A step begins without
    gradients and leaves none. In between, they add up in one of three ways:

    - By default, ``p.grad`` is None between steps and autograd adds each micro-batch's gradient.
    - *Kept* gradients are zeroed between steps instead of dropped, and autograd adds to them. DDP
      needs that: gradients made in a step would lie beside its buckets until the last micro-batch,
      and then in both.
    - Kept gradients can also be *added here*: `backward` takes each micro-batch's gradients from
      autograd and adds them with one ``foreach`` operation. That is needed where autograd's own
      gradients do not last (those of a CUDA graph lie in its memory pool, where the next
      micro-batch overwrites them), and where they are taken of rounded copies.

    *Rounded copies*: with ``rounded_to``, a step casts the blocks' matrices to half precision once,
    not once a micro-batch, and takes gradients of the copies. The bits are those of autocast,
    which rounds each time and widens each gradient.

    Args:
        objective: A module that holds the model as ``model``.
        kept: Whether gradients are zeroed between steps instead of dropped.
        added_here: Whether `backward` adds gradients up itself; needs ``kept``.
        rounded_to: The dtype of rounded copies; None: there are none. Needs ``added_here``.
    """

    def __init__(
        self, objective: nn.Module, *, kept: bool, added_here: bool, rounded_to: torch.dtype | None
    ) -> None:
        self.parameters: list[Tensor] = []  # those that train
        self.copies: dict[str, Tensor] = {}  # rounded copies, by the parameter's name in objective
        self._objective = objective
        self._kept = kept
        self._added_here = added_here
        self._rounded_to = rounded_to
        self._every: list[Tensor] = []  # all parameters of the model and of the optimizers
        # What `backward` takes gradients of: the parameters, or their copies
        self._leaves: list[Tensor] = []

    def find_parameters(self, optimizers: Iterable[torch.optim.Optimizer]) -> bool:
        """See which parameters train now; return whether they are others than before."""
        in_model = {id(p): p for p in self._objective.parameters()}
        in_optimizers = {id(p): p for optimizer in optimizers for p in parameters_of(optimizer)}
        self._every = list((in_model | in_optimizers).values())
        training = {key for key, p in in_optimizers.items() if p.requires_grad}
        parameters = [p for p in self._every if id(p) in training]
        if [*map(id, parameters)] == [*map(id, self.parameters)]:
            return False
        self.parameters = parameters
        leaves = {n: p for n, p in self._objective.named_parameters() if id(p) in training}
        self.copies = {}
        if self._rounded_to is not None:
            for name, p in leaves.items():
                if name.startswith("model.blocks.") and p.ndim == 2:
                    copy = torch.empty_like(p, dtype=self._rounded_to, requires_grad=True)
                    self.copies[name] = copy
        self._leaves = list((leaves | self.copies).values())
        return True

    def drop(self) -> None:
        """Drop all gradients; zero those that are kept, and make those that are missing.

        A gradient of a parameter that does not train may be left by an exception in an earlier
        step, or by a backward pass of the caller's.
        """
        if not self._kept:
            for p in self._every:
                p.grad = None
            return
        kept = [p.grad for p in self.parameters if p.grad is not None]
        if kept:
            torch._foreach_zero_(kept)
        training = set(map(id, self.parameters))
        for p in self._every:
            if id(p) not in training:
                p.grad = None
            elif p.grad is None:
                p.grad = torch.zeros_like(p)

    @torch.no_grad()
    def round_copies(self) -> None:
        """Cast the parameters to their rounded copies, at the start of a step."""
        if self.copies:
            parameters = [self._objective.get_parameter(name) for name in self.copies]
            torch._foreach_copy_([*self.copies.values()], [*parameters])

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's ``loss``, a scalar, to those of the step."""
        if not self._added_here:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        new = torch.autograd.grad(loss, self._leaves)
        for dtype in {gradient.dtype for gradient in new}:  # one launch for all of a dtype
            totals: list[Tensor] = []
            additions: list[Tensor] = []
            for p, gradient in zip(self.parameters, new, strict=True):
                if gradient.dtype == dtype:
                    assert p.grad is not None
                    totals.append(p.grad)
                    additions.append(gradient)
            torch._foreach_add_(totals, additions)

    def tensors(self) -> Sequence[Tensor]:
        """Return the gradients that there are."""
        return [p.grad for p in self.parameters if p.grad is not None]
