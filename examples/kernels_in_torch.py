"""The kernels in a plain torch loop: fused head and loss, gradient norm, fused AdamW.

On a GPU these are Triton kernels; elsewhere the same calls run in torch.

Run: python examples/kernels_in_torch.py
"""

import torch
from fasttrain_kernels import FusedAdamW, grad_norm, linear_cross_entropy, rms_norm, swiglu
from torch import Tensor, nn

VOCAB, DIM = 64, 32


class Network(nn.Module):
    """Two normalized SwiGLU layers; the head is applied in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, DIM)
        self.up = nn.ModuleList(nn.Linear(DIM, 4 * DIM, bias=False) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(2 * DIM, DIM, bias=False) for _ in range(2))
        self.norms = nn.ParameterList(nn.Parameter(torch.ones(DIM)) for _ in range(2))
        self.head = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            gate, value = up(rms_norm(x, norm)).chunk(2, dim=-1)
            x = x + down(swiglu(gate, value))
        return x


def main() -> list[float]:
    """Learn that the next token is the current one plus three; return the losses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Network().to(device)
    optimizer = FusedAdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(60):
        tokens = torch.randint(0, VOCAB, (8, 16), device=device)
        targets = (tokens + 3) % VOCAB
        # The full logits are never in memory.
        loss = linear_cross_entropy(
            model(tokens).flatten(0, 1), model.head.weight, targets.flatten()
        )
        loss.backward()
        norm = grad_norm([p.grad for p in model.parameters()], max_norm=1.0)
        # The update applies the clipping factor, which saves a pass over the gradients.
        optimizer.step(clip_coefficient=norm.clip_coefficient)
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == 59:
            losses.append(loss.item())
            print(f"step {step}: loss {losses[-1]:.3f}, gradient norm {norm.norm.item():.3f}")
    return losses


if __name__ == "__main__":
    main()
