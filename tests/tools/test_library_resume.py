"""The library's Trainer goes on to the bit, or refuses before anything is lost (R32)."""

import gc
import inspect
import json
import math
import multiprocessing
import os
import random
import re
import signal
import threading
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fasttrain_kernels import FusedAdamW
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler

from fasttrain import Trainer
from fasttrain.config import UserError, config_to_toml
from fasttrain.library.state import decode, encode
from fasttrain.report.page import read_run
from fasttrain.run.folder import lock_run_dir

V, T = 13, 5
Make = Callable[[Path | None], tuple[Trainer, Any]]


class Toy(nn.Module):
    """Only matrices, as torch.optim.Muon takes, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(V, 6), nn.Linear(6, V, bias=False)
        self.dropout = nn.Dropout(0.2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.dropout(self.table(tokens)).to(self.head.weight.dtype))


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import what a first training imports: some of it seeds Python's `random`."""
    trainer = made(tmp_path_factory.mktemp("warm"), eval={"every_steps": 1})
    trainer.train(DataLoader(rows(), batch_size=4, shuffle=True), [rows(4)])


@pytest.fixture(scope="module", autouse=True)
def _no_worker_is_waited_for() -> Iterator[None]:
    """A DataLoader waits 5 s for each persistent worker, which does not end when it is told to."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
        yield
        gc.collect()  # of the loaders that are left


def rows(n: int = 18) -> Tensor:
    return torch.randint(0, V, (n, T), generator=torch.Generator().manual_seed(1))


def adam(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **{"lr": 0.01} | options)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def adam_of_a_tensor(model: nn.Module) -> torch.optim.Optimizer:
    return adam(model, lr=torch.tensor(0.05))


def made(
    run_dir: Path | None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adam,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    criterion: Any = None,
    callbacks: Any = (),
    accumulate: int = 1,
    **sections: Any,
) -> Trainer:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = Toy()
    update = optimizer(model)
    config = {
        "run": {"device": "cpu", "dtype": "fp32"},
        "train": {"steps": 12} | sections.pop("train", {}),
        "log": {"every_steps": 1},
        **sections,
    }
    return Trainer(
        model, update, scheduler and scheduler(update), criterion, config,
        run_dir=run_dir, accumulate=accumulate, callbacks=callbacks,
    )  # fmt: skip


class Stop:
    """Ends a training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            trainer.stop()


def all_of(trainer: Trainer) -> tuple[Any, ...]:
    """What must be the same: weights, and all that is saved beside them."""
    groups, state = trainer._snapshot()
    tensors = {
        (group, name): (t.dtype, t.contiguous().view(-1).view(torch.uint8).tolist())
        for group, found in groups.items()
        for name, t in found.items()
    }
    return (
        tensors,
        json.dumps(state | {"provenance": None}, sort_keys=True),
        trainer.optimizer.state_dict()["param_groups"],
    )


def losses(run_dir: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in lines if row["kind"] == "train"]


def assert_same_after(stops: tuple[int, ...], tmp_path: Path, make: Make) -> None:
    """Train with and without stops, all made anew after each; compare every bit.

    Without any: go on from the checkpoint that there is.
    """
    trainer, loaders = make(tmp_path / "straight")
    trainer.train(*loaders)
    for n, stop in enumerate((*stops, None)):
        again, loaders = make(tmp_path / "resumed")
        if n or not stops:
            for load in (again.load_checkpoint, bool):  # what is drawn before train() is no matter
                torch.manual_seed(77)
                random.seed(77)
                np.random.seed(77)
                load()
        if stop:
            again.callbacks.append(Stop(stop))
        again.train(*loaders)
        assert again.step == (stop or 12)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    for ours, theirs in zip(all_of(again), all_of(trainer), strict=True):
        assert ours == theirs


# ---- optimizers and schedulers -------------------------------------------------------------------


def warm_and_decay(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [
        lr_scheduler.LinearLR(optimizer, total_iters=4),
        lr_scheduler.MultiStepLR(optimizer, [2, 2, 5], gamma=0.3),
    ]


class Factor:
    """A callable object, whose attributes are state."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return 0.97 ** (step * self.calls)


# What a scheduler's constructor may ask for, by name: a scheduler of a later torch is made of these
# or fails here by the name that is missing.
ARGUMENTS: dict[str, Any] = {
    "lr_lambda": Factor, "step_size": lambda: 2, "milestones": lambda: [3, 7, 7],
    "gamma": lambda: 0.7, "T_max": lambda: 10, "T_0": lambda: 3, "T_mult": lambda: 2,
    "base_lr": lambda: 0.01, "max_lr": lambda: 0.3, "total_steps": lambda: 14,
    "total_iters": lambda: 9, "step_size_up": lambda: 3, "patience": lambda: 0,
}  # fmt: skip
SCHEDULERS = sorted(set(lr_scheduler.__all__) - {"LRScheduler"})


def scheduler_named(name: str, optimizer: torch.optim.Optimizer) -> Any:
    kind = getattr(lr_scheduler, name)
    if name == "SequentialLR":
        return kind(optimizer, warm_and_decay(optimizer), milestones=[4])
    if name == "ChainedScheduler":
        return kind(warm_and_decay(optimizer))
    asked = inspect.signature(kind).parameters
    return kind(optimizer, **{key: make() for key, make in ARGUMENTS.items() if key in asked})


@pytest.mark.parametrize("optimizer", [sgd, adam_of_a_tensor])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_R32_every_scheduler_of_torch_goes_on_to_the_bit(
    name: str, optimizer: Callable[[nn.Module], torch.optim.Optimizer], tmp_path: Path
) -> None:
    def make(run_dir: Path | None) -> tuple[Trainer, Any]:
        trainer = made(
            run_dir, optimizer, partial(scheduler_named, name), eval={"every_steps": 1}
        )  # fmt: skip
        loader = DataLoader(rows(), batch_size=4, shuffle=True)
        return trainer, (loader, [rows(4)])

    assert_same_after((4, 7), tmp_path, make)
    assert len({loss for _, loss in losses(tmp_path / "straight")}) == 12


class Counted(torch.optim.SGD):
    """Keeps numbers that are no tensors."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["rate"] = 0.9 * state.get("rate", group["lr"])
                p.data.add_(p.grad, alpha=-state["rate"])


class ScheduleFree(torch.optim.SGD):
    """Trains at other weights than it evaluates, between which a switch rounds."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            group["train_mode"] = False

    def _switch(self, factor: float, *, to: bool) -> None:
        for group in self.param_groups:
            for p in group["params"] if group["train_mode"] != to else ():
                p.data.mul_(factor)
            group["train_mode"] = to

    def train(self) -> None:
        self._switch(1 / 0.7, to=True)

    def eval(self) -> None:
        self._switch(0.7, to=False)


def test_evaluations_and_saves_change_no_bit_of_an_optimizer_with_modes(tmp_path: Path) -> None:
    def make(run_dir: Path | None, every: int | None = 2) -> tuple[Trainer, Any]:
        optimizer = lambda model: ScheduleFree(model.parameters(), lr=0.1)  # noqa: E731
        trainer = made(run_dir, optimizer, eval={"every_steps": every})
        return trainer, (DataLoader(rows(), batch_size=4), [rows(4)])

    assert_same_after((4, 7), tmp_path, make)
    trainer, loaders = make(None, every=None)
    trainer.train(loaders[0])
    rarely, _ = make(tmp_path / "straight")
    rarely.load_checkpoint()
    for one, other in zip(trainer.model.parameters(), rarely.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("trains", [True, False])
def test_load_model_gives_what_an_optimizer_with_modes_evaluates_at(
    trains: bool, tmp_path: Path
) -> None:
    trainer = made(None, lambda model: ScheduleFree(model.parameters(), lr=0.1))
    trainer.train([rows()])
    optimizer: Any = trainer.optimizer
    if not trains:
        optimizer.eval()
    val_loss = trainer.evaluate([rows(4)])
    assert optimizer.param_groups[0]["train_mode"] is trains
    groups, _ = trainer._snapshot()
    assert optimizer.param_groups[0]["train_mode"] is trains
    other = made(None)
    other.model.load_state_dict(groups["model"] | groups.get("ema", {}))
    assert other.evaluate([rows(4)]) == val_loss


class Keeps:
    """A callback that knows all steps that it has seen."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {"steps": 0, "mean": torch.zeros(2)}

    def on_step_end(self, trainer: Trainer) -> None:
        self.seen["steps"] += 1
        self.seen["mean"] += float(trainer.train_step.loss)

    def state_dict(self) -> dict[str, Any]:
        return self.seen

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state


class Hardening(nn.Module):
    """A criterion that gets steeper with each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(()))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.factor *= 1.1
        return self.factor * nn.functional.cross_entropy(logits, targets)


def test_callbacks_and_a_criterion_with_a_state_go_on_with_it(tmp_path: Path) -> None:
    def make(run_dir: Path | None) -> tuple[Trainer, Any]:
        trainer = made(
            run_dir,
            criterion=Hardening(),
            callbacks=[Stop(99), Keeps()],
            checkpoint={"every_steps": 5} if run_dir else {},
        )
        return trainer, (DataLoader(rows(), batch_size=4, shuffle=True),)

    assert_same_after((4, 7), tmp_path, make)
    again, _ = make(None)
    again.load_checkpoint(next((tmp_path / "straight" / "checkpoints").glob("*00010")))
    assert again.callbacks[1].seen["steps"] == 10
    with pytest.raises(UserError, match=r"callbacks: \['Keeps'\] → \[\]"):
        made(None, criterion=Hardening()).load_checkpoint(tmp_path / "straight")
    unfit = Keeps()
    unfit.seen = {"losses": {1.0}}
    with pytest.raises(UserError, match=r"callbacks\.0\.losses .*\bset\b"):
        made(tmp_path / "unfit", callbacks=[unfit])


def test_optimizer_state_of_no_parameter_is_named(tmp_path: Path) -> None:
    class Global(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            self.state["global"]["n_steps"] = 1

    trainer = made(tmp_path, lambda model: Global(model.parameters(), lr=0.1))
    with pytest.raises(UserError, match=r"optimizer .*state .*'global'.*parameter"):
        trainer.train([rows()])


# LBFGS evaluates the loss by itself; SparseAdam takes sparse gradients, which nothing here clips.
NOT_TRAINED_WITH = {"LBFGS", "SparseAdam", "Optimizer"}
OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and name not in NOT_TRAINED_WITH
} | {"FusedAdamW": FusedAdamW, "Counted": Counted}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_R32_every_optimizer_of_torch_goes_on_to_the_bit(name: str, tmp_path: Path) -> None:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        model.table.bfloat16()  # torch's load_state_dict rounds all of its state to that
        table, head = model.parameters()
        return OPTIMIZERS[name]([{"params": [head], "lr": 0.02}, {"params": [table]}], lr=0.01)

    def make(run_dir: Path | None) -> tuple[Trainer, Any]:
        return made(run_dir, optimizer), (DataLoader(rows(), batch_size=4, shuffle=True),)

    assert_same_after((1, 7), tmp_path, make)
    assert len({loss for _, loss in losses(tmp_path / "straight")}) == 12


def test_R32_optimizers_that_no_trainer_can_step_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"LBFGS .*closure"):
        made(tmp_path, lambda model: torch.optim.LBFGS(model.parameters()))
    with pytest.raises(UserError, match=r"sparse gradients.*sparse=False"):
        Trainer(sparse := nn.Embedding(V, 3, sparse=True), torch.optim.SparseAdam([sparse.weight]))
    other = nn.Linear(2, 3)
    with pytest.raises(UserError, match=r"parameter .*\[3, 2\].*model"):
        made(tmp_path, lambda model: adam(nn.ModuleList([model, other])))


def test_R32_what_state_may_hold_comes_back_as_it_was() -> None:
    value = {
        "numbers": [1, 2**80, True, None, 0.1, math.inf, -math.inf, -0.0, "text", b"\x00bytes"],
        "keys": {3: "a", 2.5: "b", (1, "x"): [()], None: {}}, "!": {"!": "Tensor", "is": 3},
        "kinds": (Counter({5: 2, 1: 3}), OrderedDict(z=1, a=2), torch.bfloat16),
        "tensors": [torch.tensor(0.3, dtype=torch.float64), torch.arange(6).view(2, 3)],
        "numpy": [np.float64(0.1), np.arange(4, dtype=np.uint32), np.zeros((0, 2)), np.int64(-1)],
    }  # fmt: skip

    def typed(x: Any) -> Any:
        if isinstance(x, dict):
            return type(x), [(typed(k), typed(v)) for k, v in x.items()]
        if isinstance(x, list | tuple):
            return type(x), [typed(v) for v in x]
        if isinstance(x, Tensor | np.ndarray):
            return type(x), x.dtype, x.shape, x.tolist()
        return type(x), repr(x)

    tensors: dict[str, Tensor] = {}
    text = json.dumps(encode(value, tensors, "state"), allow_nan=False)
    back = decode(json.loads(text), tensors, torch.device("cpu"))
    assert typed(back) == typed(value)
    assert math.isnan(decode(encode(math.nan, tensors, "x"), {}, torch.device("cpu")))
    back["tensors"][1].zero_()
    assert value["tensors"][1].sum() == 15  # it is a copy
    for wrong in ({1}, object(), lambda: 1, Stop(1), np.array([None])):
        with pytest.raises(UserError, match=r"state\.a\.1 .*pickle"):
            encode({"a": [0, wrong]}, {}, "state")


# ---- loaders and generators ----------------------------------------------------------------------


class Noisy(Dataset[Tensor]):
    """Draws from four generators and its own, and records which samples were taken."""

    def __init__(self) -> None:
        self.rows, self.own, self.taken = rows(), np.random.default_rng(5), []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        self.taken.append(index)
        row = self.rows[index].clone()
        for place, token in enumerate(
            (
                random.randrange(V),
                np.random.randint(V),
                int(torch.randint(V, ())),
                int(self.own.integers(V)),
            )
        ):
            row[place] = token
        return row


class Shuffled(Sampler[int]):
    """A custom sampler with its own generator."""

    def __init__(self) -> None:
        self.order = random.Random(3)

    def __len__(self) -> int:
        return 18

    def __iter__(self) -> Iterator[int]:
        return iter(self.order.sample(range(18), 18))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


LOADERS: dict[str, Callable[[Noisy], Any]] = {
    "generator": lambda data: DataLoader(data, 4, shuffle=True, generator=seeded()),
    "drop_last": lambda data: DataLoader(data, 4, shuffle=True, drop_last=True),
    "replacement": lambda data: DataLoader(
        data, 4, sampler=RandomSampler(data, True, 70, generator=seeded())
    ),
    "sampler": lambda data: DataLoader(data, 4, sampler=Shuffled()),
    "list": lambda data: list(rows().split(4)),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", LOADERS)
def test_R32_the_samples_that_remain_come_in_their_order(
    name: str, accumulate: int, tmp_path: Path
) -> None:
    """Stopped within epochs, at the last batch of one and in the one after: 5 batches an epoch."""
    taken: list[list[int]] = []

    def make(run_dir: Path | None) -> tuple[Trainer, Any]:
        data = Noisy()
        taken.append(data.taken)
        trainer = made(run_dir, accumulate=accumulate, eval={"every_steps": 5})
        return trainer, (LOADERS[name](data), DataLoader(rows(6), 2, shuffle=True))

    assert_same_after((3, 5, 6), tmp_path, make)
    straight, rest = taken[0], taken[-1]
    if name != "list":
        assert rest
        assert straight[-len(rest) :] == rest


@pytest.mark.filterwarnings("ignore:Trainer. .*persistent_workers")
def test_R32_loaders_with_processes_go_on_in_their_order(tmp_path: Path) -> None:
    for persistent in (False, True):

        def make(run_dir: Path | None, persistent: bool = persistent) -> tuple[Trainer, Any]:
            options = {"num_workers": 1, "persistent_workers": persistent}
            data = rows() if persistent else Noisy()
            return made(run_dir), (DataLoader(data, 4, shuffle=True, **options),)

        assert_same_after((7,), tmp_path / str(persistent), make)


class Stream:
    """A loader that knows where it is, as torchdata's."""

    def __init__(self) -> None:
        self.at, self.ended, self.order = 0, True, torch.arange(18)

    def __iter__(self) -> Iterator[Tensor]:
        if self.ended:
            self.at, self.ended, self.order = 0, False, torch.randperm(18)
        while self.at < 18:
            self.at += 3
            yield rows()[self.order[self.at - 3 : self.at]]
        self.ended = True

    def state_dict(self) -> dict[str, Any]:
        return {"at": (self.at, self.ended), "order": self.order, "limit": math.inf}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["limit"] == math.inf
        (self.at, self.ended), self.order = state["at"], state["order"]


def test_R32_a_loader_that_saves_itself_is_asked_to(tmp_path: Path) -> None:
    assert_same_after((2, 6, 7), tmp_path, lambda run_dir: (made(run_dir), (Stream(),)))
    stream = Stream()
    stream.state_dict = lambda: {"pages": {1, 2}}  # type: ignore[method-assign]
    trainer = made(tmp_path / "unfit")
    with pytest.raises(UserError, match=r"loader\.pages .*\bset\b"):
        trainer.train(stream)
    assert trainer.step == 0


class Lines(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(rows())


class Counting(Shuffled):
    """Counts its passes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter(range(18))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: DataLoader(Lines(), 4), r"\bLines\b.*state_dict\(\)"),
        (lambda: (batch for batch in rows().split(4)), r"\bgenerator\b.*state_dict\(\)"),
        (
            lambda: DataLoader(rows(), 4, num_workers=1, persistent_workers=True),
            "random numbers.*persistent_workers",
        ),
        (
            lambda: DataLoader(rows(), 4, sampler=Counting()),
            r"loader\.sampler\.passes .*\b0\b.*\b1\b",
        ),
    ],
)
def test_R32_what_no_checkpoint_can_hold_is_warned_of_by_the_first_step(
    loader: Callable[[], Any], message: str, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=message):
        made(tmp_path, train={"steps": 1}).train(loader())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(None, train={"steps": 1}).train(loader())  # nothing is saved


# ---- refusals, the folder, signals ---------------------------------------------------------------


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    table, head = model.parameters()
    return torch.optim.AdamW([{"params": [table]}, {"params": [head]}], lr=0.01)


def steps_of(size: int) -> Callable[[torch.optim.Optimizer], Any]:
    return lambda optimizer: lr_scheduler.StepLR(optimizer, size)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "optimizer": ({"optimizer": sgd}, "optimizer: AdamW → SGD"),
    "lr": ({"optimizer": partial(adam, lr=0.5)}, r"optimizer lr: 0\.01 → 0\.5"),
    "groups": ({"optimizer": two_groups}, r"optimizer groups: 1 → 2\b.*\bhead\b.*: 0 → 1"),
    "no scheduler": ({"scheduler": None}, "scheduler: StepLR → none"),
    "scheduler": ({"scheduler": steps_of(3)}, "scheduler step_size: 5 → 3"),
    "nested": (
        {"scheduler": lambda o: lr_scheduler.ChainedScheduler([steps_of(5)(o)])},
        "scheduler: StepLR → ChainedScheduler",
    ),
    "config": ({"train": {"max_grad_norm": 0.1}}, r"train\.max_grad_norm: 1\.0 → 0\.1"),
    "ema": ({"train": {"ema_decay": 0.9}}, r"train\.ema_decay: None → 0\.9"),
    "criterion": ({"criterion": nn.CrossEntropyLoss()}, "criterion: NoneType → CrossEntropyLoss"),
    "accumulate": ({"accumulate": 2}, "accumulate: 1 → 2"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("saved") / "run"
    made(run_dir, scheduler=steps_of(5), train={"steps": 7}).train(
        DataLoader(rows(), batch_size=4, shuffle=True)
    )
    return run_dir


@pytest.mark.parametrize("name", CHANGES)
def test_R24_R32_another_optimizer_scheduler_or_config_is_refused_and_nothing_changed(
    name: str, saved: Path, tmp_path: Path
) -> None:
    options, message = CHANGES[name]
    trainer = made(tmp_path, **{"scheduler": steps_of(5)} | options)
    before, drawn = all_of(trainer), torch.get_rng_state()
    with pytest.raises(UserError, match=message):
        trainer.load_checkpoint(saved)
    assert all_of(trainer) == before
    assert torch.equal(torch.get_rng_state(), drawn)


def test_R24_R32_another_model_or_loader_is_refused(saved: Path, tmp_path: Path) -> None:
    trainer = made(tmp_path, scheduler=steps_of(5), train={"steps": 9})
    trainer.load_checkpoint(saved)  # more steps are no other training
    for loader, message in (
        (DataLoader(rows(), 3, shuffle=True), "loader length: 5 → 6.*batch_size: 4 → 3"),
        (DataLoader(rows(), 4), "loader.sampler: RandomSampler → SequentialSampler"),
        (DataLoader(rows(20), 4, shuffle=True), r"loader\.dataset length: 18 → 20"),
        (DataLoader(rows(), 4, shuffle=True, drop_last=True), "drop_last: False → True"),
        (
            DataLoader(rows(), 4, shuffle=True, generator=seeded()),
            r"generators: \[\] → \['loader\.generator'\]",
        ),
        ([rows(4)], "loader: DataLoader → list"),
    ):
        before = all_of(trainer)
        with pytest.raises(UserError, match=message):
            trainer.train(loader)
        assert all_of(trainer) == before
    trainer.train(DataLoader(rows(), 4, shuffle=True))
    assert trainer.step == 9
    other = made(None, scheduler=steps_of(5))
    other.model.head.weight.data = torch.zeros(V, 7)
    with pytest.raises(UserError, match=r"head\.weight .*\(13, 6\).*\(13, 7\)"):
        other.load_checkpoint(saved)
    other = made(None, scheduler=steps_of(5))
    other.model.tail = other.model._modules.pop("head")
    with pytest.raises(UserError, match=r"model\.head\.weight .*\(13, 6\).*missing"):
        other.load_checkpoint(saved)


@pytest.mark.parametrize(
    "wrong",
    [
        {"facts": 3},
        {"state": []},
        {"state": {"random": {"!": "Tensor", "is": ["no such", True]}}},
        {"state": {"random": {"!": "float", "is": "x"}}},
        {"state": {"random": {"!": "dtype", "is": "load"}}},
    ],
)
def test_R25_R32_a_malformed_state_is_one_line(wrong: dict[str, Any], tmp_path: Path) -> None:
    trainer = made(tmp_path)
    groups, state = trainer._snapshot()
    state["library"] |= wrong
    assert trainer.writer
    trainer.writer.save(0, groups, state, config_to_toml(trainer.config))
    trainer.writer.wait()
    before = all_of(trainer)
    with pytest.raises(UserError, match=r"step-00000000: .*Error\("):
        trainer.load_checkpoint()
    assert all_of(trainer) == before


def files(run_dir: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}


def test_R32_a_new_trainer_never_touches_an_earlier_run(tmp_path: Path) -> None:
    loader = DataLoader(rows(), batch_size=4)
    first = made(tmp_path / "run")
    first.train(loader)
    before = files(tmp_path / "run")
    second = made(tmp_path / "run")
    elsewhere = made(tmp_path / "run")
    elsewhere.load_checkpoint(made(tmp_path / "other").save_checkpoint())
    elsewhere.train(loader)
    assert elsewhere.run_dir == tmp_path / "run-2"
    for number, use in enumerate(
        (Trainer.train, Trainer.train_epoch, lambda t, _: t.save_checkpoint()), start=3
    ):
        trainer = made(tmp_path / "run")
        use(trainer, loader)
        trainer.save_checkpoint()
        assert trainer.run_dir == tmp_path / f"run-{number}"
        assert any((trainer.run_dir / "checkpoints").glob("step-*"))
    assert files(tmp_path / "run") == before
    second.load_checkpoint()
    second.train_epoch(loader)
    second.save_checkpoint()
    assert second.run_dir == tmp_path / "run"
    with pytest.raises(UserError, match=rf"{tmp_path}/run\b.*load_checkpoint\(\)"):
        first.train_epoch(loader)


def test_a_rerun_takes_the_next_free_folder_and_says_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses_of = []
    for name in ("own", "own-2", "own-3"):
        trainer = made(tmp_path / "own", train={"steps": 2})
        trainer.train([rows(4)] * 2)
        assert trainer.run_dir == tmp_path / name
        losses_of.append(losses(tmp_path / name))
        both = rf"{tmp_path}/own\b(?![-/]).*{tmp_path}/{name}\b(?![-/])"
        assert len(re.findall(both, capsys.readouterr().out)) == (name != "own")
    assert losses_of == [losses_of[0]] * 3
    trainer.train_epoch([rows(4)])  # goes on in its own folder
    trainer.load_checkpoint()
    assert trainer.run_dir == tmp_path / "own-3"
    assert not (tmp_path / "own-4").exists()


def test_R35_training_from_an_older_checkpoint_goes_to_a_folder_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"train": {"steps": 4}, "checkpoint": {"every_steps": 1, "keep_last": 9}}
    made(tmp_path / "own", **config).train([rows(4)] * 4)
    checkpoints = tmp_path / "own/checkpoints"
    before = {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()}
    older = checkpoints / "step-00000002"

    trainer = made(tmp_path / "own", **config)
    trainer.load_checkpoint(older)
    trainer.train([rows(4)] * 4)
    assert (trainer.step, trainer.run_dir) == (4, tmp_path / "own-2")
    told = rf"{older}\b.*newest.*{tmp_path}/own\b(?!-).*{tmp_path}/own-2\b"
    assert re.search(told, capsys.readouterr().out)
    assert {p: p.read_bytes() for p in checkpoints.rglob("*") if p.is_file()} == before
    names = {path.name for path in (tmp_path / "own-2/checkpoints").glob("step-*")}
    assert names == {"step-00000003", "step-00000004"}
    assert read_run(tmp_path / "own-2").parent == "own at step 2"

    trainer.load_checkpoint(tmp_path / "own-2/checkpoints/step-00000003")
    trainer.train([rows(4)] * 4)
    assert trainer.run_dir == tmp_path / "own-3"
    trainer.load_checkpoint(tmp_path / "own-3/checkpoints/step-00000004")  # the newest: in place
    trainer.save_checkpoint()
    assert trainer.run_dir == tmp_path / "own-3"


def test_a_newer_checkpoint_that_is_damaged_makes_no_branch(tmp_path: Path) -> None:
    config = {"train": {"steps": 2}, "checkpoint": {"every_steps": 1, "keep_last": 9}}
    made(tmp_path / "own", **config).train([rows(4)] * 2)
    (tmp_path / "own/checkpoints/step-00000002/model.safetensors").write_bytes(b"damaged")
    trainer = made(tmp_path / "own", **config)
    trainer.load_checkpoint(tmp_path / "own/checkpoints/step-00000001")
    trainer.train([rows(4)] * 2)
    assert trainer.run_dir == tmp_path / "own"


def test_a_training_that_failed_before_its_first_row_leaves_its_folder_to_the_next(
    tmp_path: Path,
) -> None:
    made(tmp_path / "own", train={"steps": 1}).train([rows(4)])
    failed = made(tmp_path / "own", train={"steps": 1})
    with pytest.raises(UserError, match=r"batch: .*\bstr\b"):
        failed.train(["text"])
    trainer = made(tmp_path / "own", train={"steps": 1})
    trainer.train([rows(4)])
    assert trainer.run_dir == tmp_path / "own-2"
    failed.train([rows(4)])
    assert failed.run_dir == tmp_path / "own-3"


def test_a_next_folder_that_another_trainer_uses_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "own-3").write_text("a file, which is no folder")
    for name in ("own", "own-4"):
        trainer = made(tmp_path / "own", train={"steps": 1})
        trainer.train([rows(4)])
        assert trainer.run_dir == tmp_path / name
    with lock_run_dir(tmp_path / "own-5"):
        trainer = made(tmp_path / "own", train={"steps": 1})
        trainer.train([rows(4)])
    assert trainer.run_dir == tmp_path / "own-6"
    with (
        lock_run_dir(tmp_path / "own"),
        pytest.raises(UserError, match=r"/own\b.*\btrainer\b.*run_dir"),
    ):
        made(tmp_path / "own")


def test_a_stopped_rerun_says_in_which_folder_to_go_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "own", train={"steps": 1}).train([rows(4)])
    trainer = made(tmp_path / "own", callbacks=Signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        trainer.train(DataLoader(rows(), 4))
    remedy = rf"load_checkpoint\(\).*run_dir='{tmp_path}/own-2'"
    assert re.search(remedy, capfd.readouterr().err)


def test_R13_R32_a_folder_has_one_trainer_at_a_time(tmp_path: Path) -> None:
    refused = []

    class Second:
        def on_step_end(self, trainer: Trainer) -> None:
            with pytest.raises(UserError, match=r"/run\b.*\btrainer\b.*run_dir") as caught:
                made(tmp_path / "run")
            refused.append(caught)

    idle = made(tmp_path / "run")
    made(tmp_path / "run", callbacks=Second(), train={"steps": 1}).train([rows(4)])
    assert refused
    idle.train([rows(4)])
    assert idle.run_dir == tmp_path / "run-2"


class Signal:
    """Sends a signal after step 4, as a terminal does: to the loader's processes as well."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == 4:
            for process in multiprocessing.active_children():
                os.kill(process.pid or 0, self.number)
            os.kill(os.getpid(), self.number)
            while not trainer._told:
                time.sleep(0.001)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_R10_R32_a_signal_ends_the_training_with_a_checkpoint(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def make(run_dir: Path | None) -> tuple[Trainer, Any]:
        workers = int(name == "SIGINT")
        return made(run_dir), (DataLoader(rows(), 4, shuffle=True, num_workers=workers), [rows(4)])

    number = signal.Signals[name]
    ours = [*{*signal.Signals} - {signal.SIGCHLD}]  # which a DataLoader takes
    handlers = [signal.getsignal(n) for n in ours]
    trainer, loaders = make(tmp_path / "resumed")
    trainer.callbacks.append(Signal(number))
    with pytest.raises(SystemExit) as caught:
        trainer.train(*loaders)
    assert caught.value.code == 75
    told = capfd.readouterr().err
    assert re.search(rf"{name}\b.*step 4\b.*load_checkpoint\(\)", told)
    assert [signal.getsignal(n) for n in ours] == handlers
    latest = tmp_path / "resumed/checkpoints/latest"
    assert latest.read_text() == "step-00000004\n"
    assert '"eval"' not in (tmp_path / "resumed/metrics.jsonl").read_text()
    assert_same_after((), tmp_path, make)


def test_R32_signals_are_left_alone_in_another_thread_and_without_a_folder(tmp_path: Path) -> None:
    seen = []

    class Look:
        def on_step_end(self, trainer: Trainer) -> None:
            seen.append(signal.getsignal(signal.SIGTERM))

    def train(run_dir: Path | None) -> None:
        made(run_dir, callbacks=Look(), train={"steps": 1}).train([rows(4)])

    train(None)
    thread = threading.Thread(target=train, args=(tmp_path / "thread",))
    thread.start()
    thread.join()
    train(tmp_path / "main")
    assert seen[:2] == [signal.getsignal(signal.SIGTERM)] * 2
    assert seen[2] != seen[0]


class BadAt(nn.CrossEntropyLoss):
    """Gives nan at some calls."""

    def __init__(self, *calls: int) -> None:
        super().__init__()
        self.bad, self.calls = calls, 0

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(logits, targets) * (math.nan if self.calls in self.bad else 1.0)


@pytest.mark.parametrize("optimizer", [sgd, lambda model: FusedAdamW(model.parameters())])
def test_R18_R32_the_scheduler_does_not_follow_a_skipped_step(
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
) -> None:
    trainer = made(
        None, optimizer, lambda o: lr_scheduler.ExponentialLR(o, 0.5), BadAt(1, 3, 4),
        train={"steps": 6},
    )  # fmt: skip
    base = trainer.optimizer.param_groups[0]["lr"]
    trainer.train(list(rows().split(3)))
    assert trainer.skipped_steps == 3
    assert trainer.metrics.values("lr") == [base * 0.5**n for n in (0, 1, 1, 1, 2, 3)]


def test_R32_a_plateau_that_never_evaluates_is_warned_of_and_saved(tmp_path: Path) -> None:
    trainer = made(tmp_path, scheduler=lr_scheduler.ReduceLROnPlateau, train={"steps": 2})
    with pytest.warns(UserWarning, match=r"ReduceLROnPlateau\b.*eval\.every_steps"):
        trainer.train([rows(4)])
    again = made(tmp_path, scheduler=lr_scheduler.ReduceLROnPlateau)
    again.load_checkpoint()
    assert again.scheduler.best == math.inf  # type: ignore[union-attr]
    assert again.step == 2


def test_R32_evaluations_change_nothing_of_the_training(tmp_path: Path) -> None:
    """Neither do they draw from its random numbers, nor does the one at the end decide anything."""
    weights: list[Tensor] = []
    for every in (1, 5, None):
        trainer = made(None, eval={"every_steps": every})
        loader = DataLoader(rows(), 4, shuffle=True)
        trainer.train(loader, DataLoader(rows(6), 2, shuffle=True))
        weights.append(trainer.model.state_dict()["head.weight"])
        assert len(trainer.val_losses) == (12 // every if every else 0)
        assert len(trainer.metrics.values("val_loss")) == len(trainer.val_losses) + (every != 1)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
