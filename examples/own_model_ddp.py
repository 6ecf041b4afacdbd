"""A custom model in several processes: the same script under python and under torchrun.

Run: torchrun --nproc-per-node 2 examples/own_model_ddp.py [FOLDER [MODE]]
(a few seconds on a CPU; FOLDER: runs/own_model_ddp; MODE: ddp or fsdp)
"""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from fasttrain import Trainer

VOCAB, ROWS_PER_STEP = 32, 16


class Mixer(nn.Module):
    """Residual layers over a running mean: token ids (B, T) in, logits (B, T, V) out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.head = nn.Linear(32, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for layer in self.layers:
            mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
            x = x + torch.tanh(layer(x + mean))
        return self.head(x)


def main(folder: Path, mode: str) -> list[float]:
    """Train for half of the epochs, resume from the checkpoint, and return the losses."""
    # torchrun sets these; each process loads its own part of every step's rows.
    rank, n_ranks = (int(os.environ.get(k, n)) for k, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    starts = torch.randint(VOCAB, (256, 1), generator=torch.Generator().manual_seed(0))
    rows = (starts + 3 * torch.arange(12)) % VOCAB  # counting by threes
    sampler = DistributedSampler(rows, n_ranks, rank, shuffle=True)  # type: ignore[arg-type]
    loader = DataLoader(rows, ROWS_PER_STEP // n_ranks, sampler=sampler)  # type: ignore[arg-type]
    losses = []
    for epochs in (2, 4):
        torch.manual_seed(0)
        model = Mixer()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        config = {
            "run": {"device": "cuda" if torch.cuda.is_available() else "cpu", "dtype": "fp32"},
            "train": {"epochs": epochs},
            "log": {"every_steps": 1},
        }
        if n_ranks > 1:
            config["distributed"] = {"mode": mode}
        trainer = Trainer(model, optimizer, config=config, run_dir=folder)
        if epochs > 2:
            trainer.load_checkpoint()
        metrics = trainer.train(loader, loader)  # every rank calls the same methods
        losses += metrics.values("loss")
        folder = trainer.run_dir or folder  # another one where it held an earlier run
    if rank == 0:
        print(f"{n_ranks} ranks, {len(losses)} steps: loss {losses[0]:.4f} → {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    arguments = [*sys.argv[1:], *("runs/own_model_ddp", "ddp")[len(sys.argv) - 1 :]]
    main(Path(arguments[0]), arguments[1])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # no rank leaves while another still needs it
