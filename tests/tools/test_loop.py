"""`train_loop` against the same loop written out in plain torch."""

import math
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fasttrain import Trainer, Transformer, diagnose, library, train_loop
from fasttrain.config import ModelConfig, UserError
from fasttrain.engine import step

V, T = 17, 6


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(V, 8), nn.Dropout(0.1), nn.Linear(8, V))


@pytest.fixture
def loader() -> DataLoader[dict[str, Tensor]]:
    torch.manual_seed(1)
    rows = [torch.randint(V, (T + 1,)) for _ in range(10)]
    items = [{"input_ids": r[:-1], "target_ids": r[1:]} for r in rows]
    items[3]["target_ids"] = torch.full((T,), -100)
    return DataLoader(items, batch_size=4)  # type: ignore[arg-type]


def test_equals_the_loop_in_plain_torch(loader: DataLoader[dict[str, Tensor]]) -> None:
    ours, plain = make_model().eval(), make_model()
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.05)
    torch.manual_seed(2)
    result = train_loop(ours, loader, optimizer, 4, max_grad_norm=0.1, log_interval=5, device="cpu")
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05)
    torch.manual_seed(2)
    losses = []
    for _ in range(4):
        for batch in loader:
            logits = plain(batch["input_ids"])
            loss = F.cross_entropy(logits.flatten(0, 1), batch["target_ids"].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            optimizer.step()
            losses.append(loss.item())
    assert ours.training
    assert result["steps"] == [5, 10, 12]  # three batches an epoch, the last one smaller
    assert result["losses"] == pytest.approx([losses[4], losses[9], losses[11]], rel=1e-5)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_a_schedule_outside_applies(loader: DataLoader[dict[str, Tensor]]) -> None:
    model = make_model()
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)
    rates: list[float] = []

    def hook(optimizer: Any, *_: object) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.last_epoch += 1

    optimizer.register_step_post_hook(hook)
    train_loop(model, loader, optimizer, 1, device="cpu")
    assert rates == [0.0, 0.0, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_only_logged_steps_read_the_loss(
    loader: DataLoader[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list(loader)
    reads: list[str] = []

    def counted(read: str) -> Callable[[Tensor], Any]:
        real = getattr(Tensor, read)

        def count(tensor: Tensor) -> Any:
            # On a CPU the operations, and the look at the ids, read numbers of their own.
            if sys._getframe(1).f_code.co_filename in (library.__file__, step.__file__):
                reads.append(read)
            return real(tensor)

        return count

    for read in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, read, counted(read))
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_loop(model, made, optimizer, 4, None, log_interval=4, device="cpu")
    assert reads == ["tolist"] * 3


def test_the_last_step_is_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = train_loop(model, list(batches()) * 8, optimizer, 1, log_interval=100, device="cpu")
    assert result["steps"] == [8]
    assert capsys.readouterr().out == f"Epoch 0, step 8, loss {result['losses'][0]:.4f}\n"
    train_loop(model, list(batches()), optimizer, 2, log_interval=1, device="cpu", quiet=True)
    assert not capsys.readouterr().out
    train_loop(model, list(batches()), optimizer, 2, log_interval=1, device="cpu")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(", loss ")[0] for line in lines] == [
        "Epoch 0, step 1",
        "Epoch 1, step 2",
    ]
    assert len(result["losses"]) == 1
    exact = train_loop(model, list(batches()) * 8, optimizer, 1, log_interval=8, device="cpu")
    assert exact["steps"] == [8]  # once


def test_train_loop_names_an_argument_of_a_wrong_kind() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for arguments, message in (
        (("gpt2", [], optimizer, 1), r"^train_loop: model .*'gpt2'.*torch\.nn\.Module"),
        ((model, [], optimizer, "1"), "^train_loop: num_epochs .*'1'.*integer"),
        ((model, [], optimizer, 1, "1"), "^train_loop: max_grad_norm .*'1'.*number"),
        ((model, [], optimizer, 1, -1.0), r"max_grad_norm .*-1\.0.*> 0"),
        ((model, [], optimizer, 1, math.nan), "max_grad_norm .*nan.*> 0"),
        ((model, [], optimizer, 1, 1.0, 0.5), r"^train_loop: log_interval .*0\.5.*integer"),
        ((model, [], "sgd", 1), r"optimizer .*'sgd'.*torch\.optim"),
    ):
        with pytest.raises(UserError, match=message):
            train_loop(*arguments, device="cpu")  # type: ignore[arg-type]


def test_batches_of_every_usual_form_are_the_same() -> None:
    ids = torch.randint(V, (8, T + 1), generator=torch.Generator().manual_seed(1))
    tokens, targets = ids[:, :-1], ids[:, 1:]
    shifted = torch.cat([tokens[:, 1:], torch.full((8, 1), -100)], 1)
    for first, *others in (
        (
            [{"input_ids": tokens, "target_ids": targets}],
            [(tokens, targets)],
            DataLoader(TensorDataset(tokens.int(), targets.int()), batch_size=8),
        ),
        (
            [{"input_ids": tokens, "target_ids": shifted}],
            [{"input_ids": tokens, "labels": tokens}],
            [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}],
            DataLoader(TensorDataset(tokens), batch_size=8),
            DataLoader(tokens, batch_size=8),  # type: ignore[arg-type]
        ),
    ):
        losses = []
        for data in (first, *others):
            model = make_model()
            model[1] = nn.Identity()  # no dropout: a DataLoader draws random numbers of its own
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            losses += train_loop(model, data, optimizer, 1, device="cpu")["losses"]
        assert losses == [losses[0]] * (1 + len(others))


class Wrapped(nn.Module):
    """Returns its logits in some form."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.form = make_model(), form

    def forward(self, tokens: Tensor) -> Any:
        return self.form(self.model(tokens))


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda logits: (logits, None),
    "object": lambda logits: SimpleNamespace(logits=logits),
    "dict": lambda logits: {"loss": None, "logits": logits},
}


@pytest.mark.parametrize("form", FORMS)
def test_models_may_return_more_than_logits(form: str) -> None:
    ids = torch.randint(V, (4, T + 1), generator=torch.Generator().manual_seed(1))
    data = [(ids[:, :-1], ids[:, 1:])]
    results = []
    for make in (make_model, lambda: Wrapped(FORMS[form])):
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(3)
        results.append(train_loop(model, data, optimizer, 1, device="cpu"))
        trainer = Trainer(model, optimizer, config={"run": {"device": "cpu", "dtype": "fp32"}})
        torch.manual_seed(3)
        trainer.train(data)
        results[-1]["losses"] += trainer.metrics.values("loss")
        results[-1]["checks"] = [f.status for f in diagnose(model, data[0]).findings]
    assert results[0] == results[1]
    assert "fail" not in results[0]["checks"]


def test_our_own_model_trains_in_every_loop() -> None:
    ids = torch.randint(V, (12, T + 1), generator=torch.Generator().manual_seed(1))
    data = [(rows[:, :-1], rows[:, 1:]) for rows in ids.split(4)]

    def make() -> tuple[Transformer, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = Transformer(ModelConfig(vocab_size=V, dim=16, n_layers=1, n_heads=2), seq_len=T)
        return model, torch.optim.SGD(model.parameters(), lr=0.5)

    model, optimizer = make()
    losses = []
    for tokens, targets in data * 2:  # as nanoGPT's loop, and any other
        logits = model(tokens)
        loss = F.cross_entropy(logits.view(-1, V), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model, optimizer = make()
    ours = train_loop(model, data, optimizer, 2, log_interval=1, device="cpu")
    assert ours["losses"] == pytest.approx(losses, rel=1e-5)
    sections = {"run": {"device": "cpu", "dtype": "fp32"}, "train": {"epochs": 2}}
    trainer = Trainer(*make(), config=sections)
    assert trainer.train(data).values("loss") == pytest.approx(losses, rel=1e-5)


def batches(**changes: Any) -> Iterator[dict[str, Tensor]]:
    batch = {"input_ids": torch.zeros(2, T, dtype=torch.long)}
    yield {**batch, "target_ids": batch["input_ids"], **changes}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"x": torch.zeros(2, T, dtype=torch.long)}], r"\['x'\].*input_ids"),
        (list(batches(targets=torch.zeros(2, T, dtype=torch.long))), "'targets'.*target_ids"),
        (
            list(batches(target_ids=torch.zeros(2, T - 1, dtype=torch.long))),
            r"'target_ids': \(2, 5\).*\(B, T\)",
        ),
        (list(batches(input_ids=torch.zeros(2, T))), r"input_ids .*torch\.float32.*\.long\(\)"),
        (list(batches(target_ids=torch.full((2, T), V))), rf"target .*\b{V}\b.*\b{V} logits"),
        (list(batches(input_ids=torch.full((2, T), V))), rf"index {V}\b.* {V} .* 0\b.*tokenizer"),
        (list(batches(input_ids=[[0]])), r"input_ids .*\blist\b.*\(B, T\)"),
        (
            TensorDataset(torch.zeros(2, T).long(), torch.zeros(2, T).long()),
            r"\(6,\).*\(B, T\).*DataLoader",
        ),
        ([(torch.zeros(2, T).long(),) * 3], r"\btuple\b.*\b3\b.*\(input_ids, target_ids\)"),
        (["text"], r"\bstr\b.*\(input_ids, target_ids\)"),
        (list(batches(labels=torch.zeros(2, T + 1).long())), r"'labels': \(2, "),
        (list(batches(attention_mask=torch.arange(T).expand(2, T) > 2)), "left.*attention_mask"),
        (list(batches(pixels=torch.ones(2))), "'pixels'.*forward"),
        ([], r"epoch 1\b.*batch.*DataLoader"),
    ],
)
def test_a_wrong_batch_is_named(data: Any, message: str) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=message):
        train_loop(model, data, optimizer, 1, device="cpu")


def test_a_model_of_the_wrong_shape_and_bad_numbers_are_named() -> None:
    model = nn.Embedding(V, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    flat = nn.Sequential(model, nn.Flatten())
    with pytest.raises(UserError, match=r"logits \(B, T, V\)"):
        train_loop(flat, list(batches()), optimizer, 1, device="cpu")
    with pytest.raises(UserError, match="log_interval = 0"):
        train_loop(model, list(batches()), optimizer, 1, log_interval=0, device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r'device="cuda:1".*device="cpu"'):
            train_loop(model, list(batches()), optimizer, 1, device="cuda:1")
    with pytest.raises(UserError, match='device="gpu"'):
        train_loop(model, list(batches()), optimizer, 1, device="gpu")
