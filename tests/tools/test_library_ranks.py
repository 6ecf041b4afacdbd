"""The library on two ranks: the losses of one process, resumed to the bit, stopped together."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_script

SCRIPT = """
import json, os, signal, sys, time, warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from fasttrain import Trainer, Transformer, train_loop
from fasttrain.config import ModelConfig, UserError
from fasttrain import resolve as settings

torch.set_num_threads(1)
rank, size = (int(os.environ.get(k, n)) for k, n in (("RANK", 0), ("WORLD_SIZE", 1)))
folder, found, V, T = Path(sys.argv[1]), {}, 17, 6


class Toy(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.table = nn.Embedding(V, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.head, self.dropout = nn.Linear(8, V), nn.Dropout(dropout)

    def forward(self, tokens):
        x = self.table(tokens).cumsum(1)
        for layer in self.layers:
            x = x + self.dropout(layer(x))
        return self.head(x)


class Seen:
    def __init__(self):
        self.steps = []

    def on_step_end(self, trainer):
        self.steps.append(trainer.step)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def loader(n, batch, shuffle=False):
    ids = torch.randint(V, (n, T), generator=torch.Generator().manual_seed(n))
    rows = [
        {"input_ids": row, "attention_mask": (torch.arange(T) < 2 + i % 5).long()}
        for i, row in enumerate(ids)
    ]
    sampler = DistributedSampler(rows, size, rank, shuffle=shuffle)
    return DataLoader(rows, batch // size, sampler=sampler)


def made(run_dir, model, mode, *, steps=10, seed=None, accumulate=2, **sections):
    torch.manual_seed(seed if seed is not None else rank)  # rank 0's parameters count
    model = model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    torch.manual_seed(100 + rank)
    config = {
        "run": {"device": "cpu", "dtype": "fp32"}, "log": {"every_steps": 1},
        "train": {"steps": steps, "ema_decay": 0.8, **sections.pop("train", {})},
        "eval": {"every_steps": 3}, **sections,
    }
    if size > 1:
        config["distributed"] = {"mode": mode}
    return Trainer(
        model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3), nn.CrossEntropyLoss(),
        config, run_dir=run_dir, accumulate=accumulate,
        metrics={"accuracy": lambda logits, targets: (logits.argmax(-1) == targets).float().mean()},
    )


def ours():
    return Transformer(ModelConfig(vocab_size=V, dim=16, n_layers=2, n_heads=2), seq_len=T)


def plain(batch):  # our model takes no mask
    for row in batch.dataset:
        row.pop("attention_mask", None)
    return batch


def record(name, trainer):
    found[name] = {key: trainer.metrics.values(key)
                   for key in ("loss", "grad_norm", "lr", "val_loss", "val_accuracy")}


modes = ["ddp", "fsdp"] if size > 1 else ["single"]
for mode in modes:
    for name, model, change, sections in (
        ("toy", Toy, lambda loader: loader, {}),
        ("ours", ours, plain, {"train": {"activation_checkpointing": "full"}}),
    ):
        train, val = change(loader(24, 4, shuffle=True)), change(loader(8, 4))
        trainer = made(folder / f"{name}-{mode}-{size}", model, mode, **sections)
        trainer.train(train, val)
        record(f"{name} {mode}", trainer)
    # With dropout, and generators that differ: stopped within an epoch, and gone on from a path.
    results = []
    for stop in (None, 4):
        place, dropped = folder / f"kept-{mode}-{size}", lambda: Toy(0.3)
        trainer = made(None, dropped, mode, steps=stop or 10)
        trainer.callbacks += [Seen()] * rank  # of one rank alone
        trainer.train(loader(24, 4, shuffle=True))
        if stop:
            trainer.save_checkpoint(place)
            trainer = made(None, dropped, mode, seed=7)
            trainer.callbacks += [Seen()] * rank
            trainer.load_checkpoint(place)
            trainer.train(loader(24, 4, shuffle=True))
        numbers = [*trainer.model.parameters(), *trainer.ema.averages.values()]
        results.append([getattr(t, "_local_tensor", t).tolist() for t in numbers])
        results[-1].append(trainer.metrics.values("loss")[-6:])
        results[-1].append([callback.steps for callback in trainer.callbacks])
    assert results[0] == results[1]

torch.manual_seed(0)
model = Toy()
result = train_loop(
    model, loader(24, 4, shuffle=True), torch.optim.SGD(model.parameters(), lr=0.3), 3,
    log_interval=1, device="cpu",
)
found["train_loop"] = {"loss": result["losses"]}

if size > 1:
    def refused(call, what):
        try:
            call()
        except UserError as error:
            assert what in str(error), error
            return
        raise AssertionError(what)

    trainer, ones = made(None, Toy, "ddp"), {"input_ids": torch.ones(2, T).long()}
    wrapped, kept = lambda: nn.parallel.DistributedDataParallel(Toy()), folder / "kept-ddp-2"
    other, earlier = made(None, Toy, "ddp", accumulate=1), folder / "toy-ddp-2"
    refused(lambda: trainer.train([ones] * (1 + rank)), "DistributedSampler")
    refused(lambda: made(None, wrapped, "ddp"), "DDP")
    again = made(earlier, Toy, "ddp", steps=2)
    again.train(loader(24, 4))
    found["again"] = [again.run_dir.name, again.writer.folder.parent.name]
    refused(lambda: other.load_checkpoint(kept), "accumulate")
    settings._has_cpp_compiler = lambda: True
    compiled = {"run": {"device": "cpu", "compile": "default"}}
    refused(lambda: made(None, Toy, "fsdp", **compiled), "distributed.mode")
    refused(lambda: trainer.load_checkpoint(folder / "toy-single-1"), "ranks: 1 → 2")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made(None, Toy, "ddp", steps=1).train(DataLoader(loader(8, 4).dataset, 2))
    assert any("DistributedSampler" in str(warning.message) for warning in caught)

    class Told:
        def on_step_end(self, trainer):
            if trainer.step == 3 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                while not trainer._told:  # a thread learns of it
                    time.sleep(0.001)

    trainer = made(folder / "stopped", Toy, "ddp")
    trainer.callbacks.append(Told())
    try:
        trainer.train(loader(24, 4))
    except SystemExit as left:
        found["stopped"] = [left.code, trainer.step]
    trainer = made(folder / "stopped", Toy, "ddp")
    trainer.load_checkpoint()
    found["went on"] = [trainer.step]

(folder / f"found-{size}-{rank}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank found: of one process, and of two."""
    folder, results = tmp_path_factory.mktemp("ranks"), {}
    for size in (1, 2):
        printed = run_script(SCRIPT, str(folder), size=size, folder=folder)
        files = [folder / f"found-{size}-{rank}.json" for rank in range(size)]
        assert all(map(Path.exists, files)), "\n".join(text[-3000:] for text in printed)
        results[size] = [json.loads(file.read_text()) for file in files]
        assert ("Epoch 2, step 18, loss" in printed[0], len(printed)) == (True, size)
        for said in ("Epoch", "val_loss", "saved "):
            assert said in printed[0]
            assert not any(said in text for text in printed[1:])
        moved = re.findall(r"/toy-ddp-2\b(?![-/]).*/toy-ddp-2-2\b(?![-/])", printed[0])
        assert len(moved) == size - 1
    return results


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["toy", "ours"])
def test_two_ranks_have_the_losses_of_one_process(found: Any, name: str, mode: str) -> None:
    (alone,) = found[1]
    for of_rank in found[2]:
        numbers = of_rank[f"{name} {mode}"]
        assert len(numbers["loss"]) == 10
        assert len(numbers["val_loss"]) == 4
        for key, values in numbers.items():
            assert values == pytest.approx(alone[f"{name} single"][key], rel=1e-5, abs=1e-6), key


def test_train_loop_shares_its_steps(found: Any) -> None:
    for of_rank in found[2]:
        assert len(of_rank["train_loop"]["loss"]) == 18
        assert of_rank["train_loop"]["loss"] == pytest.approx(
            found[1][0]["train_loop"]["loss"], rel=1e-5
        )


def test_all_ranks_of_a_rerun_take_the_same_next_folder(found: Any) -> None:
    for of_rank in found[2]:
        assert of_rank["again"] == ["toy-ddp-2-2", "toy-ddp-2-2"]


def test_a_signal_to_one_rank_stops_all_at_the_same_step(found: Any) -> None:
    for of_rank in found[2]:
        assert of_rank["stopped"] == [75, 3]
        assert of_rank["went on"] == [3]
