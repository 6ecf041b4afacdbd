"""`train_loop` against the same loop written out in plain torch."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fasttrain import train_loop
from fasttrain.config import UserError

V, T = 17, 6


def make_model() -> nn.Module:
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
    ours, plain = make_model(), make_model()
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
    assert result["steps"] == [5, 10]  # three batches an epoch, the last one smaller
    assert result["losses"] == pytest.approx([losses[4], losses[9]], rel=1e-5)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_learns_and_trains_in_training_mode(loader: DataLoader[dict[str, Tensor]]) -> None:
    model = make_model().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    result = train_loop(model, loader, optimizer, 30, None, 1, device="cpu")
    assert len(result["steps"]) == len(result["losses"]) == 90
    assert sum(result["losses"][-6:]) < 0.8 * sum(result["losses"][:6])
    assert model.training


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
    reads: list[int] = []
    item = Tensor.item

    def counted(tensor: Tensor) -> float:
        if tensor.requires_grad:  # the loss; on a CPU the operations read numbers of their own
            reads.append(1)
        return item(tensor)  # type: ignore[return-value]

    monkeypatch.setattr(Tensor, "item", counted)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_loop(model, made, optimizer, 4, None, log_interval=4, device="cpu")
    assert len(reads) == 3


def batches(**changes: Tensor) -> Iterator[dict[str, Tensor]]:
    batch = {"input_ids": torch.zeros(2, T, dtype=torch.long)}
    yield {**batch, "target_ids": batch["input_ids"], **changes}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"input_ids": torch.zeros(2, T, dtype=torch.long)}], "no 'target_ids'"),
        (list(batches(target_ids=torch.zeros(2, T - 1, dtype=torch.long))), "needs one target"),
    ],
)
def test_a_wrong_batch_is_named(data: list[dict[str, Tensor]], message: str) -> None:
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
        with pytest.raises(UserError, match="no such CUDA device"):
            train_loop(model, list(batches()), optimizer, 1)
