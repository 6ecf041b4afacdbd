"""Gradients of a custom model on two ranks are those of one process, whatever happens to them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_script

SCRIPT = """
import json, os, sys, warnings
from pathlib import Path

import torch
from torch import nn

from fasttrain import Trainer

warnings.simplefilter("ignore")
torch.set_num_threads(1)
rank, size = (int(os.environ.get(k, n)) for k, n in (("RANK", 0), ("WORLD_SIZE", 1)))
folder, found, V = Path(sys.argv[1]), {}, 17


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(V, 8), nn.Linear(8, V)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.unused = nn.Linear(8, 8)
        self.n_calls, self.fails_at, self.drops = 0, None, False

    def forward(self, tokens):
        self.n_calls += 1
        x = self.table(tokens).cumsum(1)
        for i, layer in enumerate(self.layers):
            if not (self.drops and i == 1 and self.n_calls // 2 % 2):
                x = x + layer(x)
        if self.n_calls == self.fails_at:
            raise RuntimeError("planned")
        return self.head(x)


class Freezes:
    def on_step_end(self, trainer):
        layers = trainer.model.layers
        if trainer.step == 2:
            layers[0].requires_grad_(True)
            layers[2].requires_grad_(False)
        if trainer.step == 4:
            layers[2].requires_grad_(True)


def whole(p):
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().tolist()


rows = torch.randint(V, (48, 6), generator=torch.Generator().manual_seed(1))
batches = [b.chunk(size)[rank] for b in rows.split(4)]
for mode in ["ddp", "fsdp"] if size > 1 else ["single"]:
    distributed = {"distributed": {"mode": mode}} if size > 1 else {}
    config = {
        "run": {"device": "cpu", "dtype": "fp32"}, "log": {"every_steps": 1}, **distributed,
        "train": {"epochs": 1, "ema_decay": 0.5, "max_grad_norm": 0.5},
    }
    for accumulate in (1, 2):
        # A layer that some steps leave out, one that all do, and some that are frozen for a while
        torch.manual_seed(0)
        model = Toy()
        model.drops = True
        model.layers[0].requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.3)
        trainer = Trainer(
            model, optimizer, config=config, accumulate=accumulate, callbacks=[Freezes()]
        )
        unused = whole(model.unused.weight)
        trainer.train(batches)
        assert whole(model.unused.weight) == unused
        found[f"{mode} {accumulate}"] = {
            "loss": trainer.metrics.values("loss"),
            "norm": trainer.metrics.values("grad_norm"),
            "parameters": [whole(p) for p in model.parameters()],
            "averages": [whole(p) for _, p in sorted(trainer.ema.averages.items())],
        }
    # A step that fails in its second micro-batch, then the same batches again
    for fails_at in (None, 5):
        torch.manual_seed(0)
        model = Toy()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        trainer = Trainer(model, optimizer, config=config, accumulate=3)
        model.fails_at = fails_at
        try:
            trainer.train(batches)
        except RuntimeError as error:
            assert str(error) == "planned"
            model.fails_at = None
            trainer.train(batches)
        found[f"{mode} failed at {fails_at}"] = {"norm": trainer.metrics.values("grad_norm")[:4]}

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
    return results


def flat(values: Any) -> list[float]:
    return [x for v in values for x in flat(v)] if isinstance(values, list) else [values]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_R37_unused_and_frozen_parameters_train_as_in_one_process(
    found: Any, accumulate: int, mode: str
) -> None:
    expected = found[1][0][f"single {accumulate}"]
    for of_rank in found[2]:
        for key, values in of_rank[f"{mode} {accumulate}"].items():
            assert flat(values) == pytest.approx(flat(expected[key]), rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_R37_a_step_that_failed_between_micro_batches_leaves_nothing_to_the_next(
    found: Any, mode: str
) -> None:
    assert found[1][0]["single failed at 5"] == found[1][0]["single failed at None"]
    for of_rank in found[2]:
        failed, sound = (of_rank[f"{mode} failed at {step}"]["norm"] for step in (5, None))
        assert len(sound) == 4
        assert failed == sound == pytest.approx(found[1][0]["single failed at None"]["norm"])
