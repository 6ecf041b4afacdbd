"""Your own model in `fasttrain.Trainer`: padded batches, a torch schedule, a callback.

Run: python examples/own_model.py [FOLDER]      (a few seconds on a CPU; FOLDER: runs/own_model)
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fasttrain import Callback, TrainConfig, Trainer
from fasttrain.config import EvalConfig, LogConfig, LoopConfig, RunConfig

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LONGEST = 12


class Recurrent(nn.Module):
    """A GRU over letters: token ids (B, T) in, logits (B, T, V) out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(27, 32)
        self.gru = nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, 27)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.gru(self.table(tokens))[0])


def words(n: int, seed: int) -> list[dict[str, Tensor]]:
    """Return stretches of the alphabet, padded on the right to the same length."""
    rows = []
    generator = torch.Generator().manual_seed(seed)
    for start, length in torch.randint(0, 13, (n, 2), generator=generator).tolist():
        ids = torch.zeros(LONGEST, dtype=torch.long)  # 0 is the padding
        n_letters = max(2, min(length, LONGEST))
        ids[:n_letters] = torch.arange(start, start + n_letters) + 1
        rows.append({"input_ids": ids, "attention_mask": (ids > 0).long()})
    return rows


class Spell(Callback):
    """After each evaluation, print how the model goes on from "abc"."""

    @torch.no_grad()
    def on_evaluate(self, trainer: Trainer, result: dict[str, float]) -> None:
        ids = torch.tensor([[1, 2, 3]])
        while ids.shape[1] < LONGEST:
            ids = torch.cat([ids, trainer.model(ids)[:, -1:].argmax(-1)], dim=1)
        print("".join(f"_{LETTERS}"[number] for number in ids[0].tolist()))


def main(folder: Path) -> None:
    """Train, save, and load the checkpoint."""
    torch.manual_seed(0)
    config = TrainConfig(
        run=RunConfig(device="cpu"),
        train=LoopConfig(epochs=3, max_grad_norm=1.0),
        eval=EvalConfig(every_steps=25),
        log=LogConfig(csv=True),
    )
    model = Recurrent()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=96)
    trainer = Trainer(
        model,
        optimizer,
        scheduler,
        nn.CrossEntropyLoss(ignore_index=-100),
        config,
        run_dir=folder,
        metrics={"accuracy": lambda logits, targets: (logits.argmax(-1) == targets).float().mean()},
        callbacks=[Spell()],
    )
    metrics = trainer.train(
        DataLoader(words(512, seed=1), batch_size=16, shuffle=True),
        DataLoader(words(64, seed=2), batch_size=16),
    )
    print(metrics.summary())
    trainer.load_checkpoint()
    print(f"loaded step {trainer.step}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_model"))
