"""`Trainer` on models and criteria as people have them: weighted means, frozen parts, wrappers."""

import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import FusedAdamW
from torch import Tensor, nn

from fasttrain import Trainer, train_loop
from fasttrain.config import UserError
from fasttrain.distributed.sharding import evaluating
from fasttrain.distributed.world import World
from fasttrain.library.objective import signature_of
from fasttrain.model.transformer import Transformer

V = 6
WEIGHT = torch.tensor([10.0, 1.0, 1.0, 0.1, 0.1, 5.0])


def toy() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, V))


def rows(n: int = 8, seed: int = 0) -> Tensor:
    ids = torch.randint(V, (n, 9), generator=torch.Generator().manual_seed(seed))
    ids[: n // 2] = ids[: n // 2].clamp(min=3, max=4)  # light classes in the first half
    return ids


def trainer_of(model: nn.Module, criterion: Any = None, **options: Any) -> Trainer:
    sections = {
        "train": {"steps": 1, "max_grad_norm": None, **options.pop("train", {})},
        "run": {"dtype": "fp32", "device": "cpu"},
        **options.pop("sections", {}),
    }
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=1.0)
    return Trainer(model, optimizer, criterion=criterion, config=sections, **options)


class LogSoftmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = toy()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens).log_softmax(-1)


@pytest.mark.parametrize(
    ("kind", "smoothing"), [("CrossEntropyLoss", 0.0), ("CrossEntropyLoss", 0.1), ("NLLLoss", 0.0)]
)
def test_class_weights_make_a_weighted_mean_over_the_whole_step(
    kind: str, smoothing: float
) -> None:
    more = {"label_smoothing": smoothing} if smoothing else {}
    criterion = getattr(nn, kind)(weight=WEIGHT, **more)
    make = toy if kind == "CrossEntropyLoss" else LogSoftmax
    data = rows()
    data[1, 4:] = -100
    tokens = data.clamp(min=0)
    batch = {"input_ids": tokens, "labels": data}
    targets = torch.cat([data[:, 1:], torch.full_like(data[:, :1], -100)], 1).flatten()
    expected = criterion(make()(tokens).flatten(0, 1), targets)
    results = []
    for n in (1, 2, 4):
        parts = [{k: v.chunk(n)[i] for k, v in batch.items()} for i in range(n)]
        model = make()
        trainer = trainer_of(model, criterion, accumulate=n)
        assert trainer.evaluate(parts)["val_loss"] == pytest.approx(expected.item(), rel=1e-5)
        trainer.train(parts)
        assert float(trainer.train_step.loss) == pytest.approx(expected.item(), rel=1e-5)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-6)
    assert criterion.reduction == "mean"  # the caller's own is as it was


@pytest.mark.parametrize(
    "options",
    [{"reduction": "sum"}, {"weight": WEIGHT, "label_smoothing": 0.1}, {"ignore_index": 3}],
    ids=str,
)
def test_a_partial_of_cross_entropy_counts_as_the_module_does(options: dict[str, Any]) -> None:
    losses = []
    for criterion in (
        nn.CrossEntropyLoss(**options),
        partial(nn.functional.cross_entropy, **options),
    ):
        trainer = trainer_of(toy(), criterion, accumulate=2)
        evaluated = trainer.evaluate([*rows().chunk(2)])["val_loss"]
        trainer.train([*rows().chunk(2)])
        losses.append((evaluated, float(trainer.train_step.loss)))
    assert losses[0] == losses[1]


def test_what_is_changed_on_a_criterion_counts_from_then_on() -> None:
    given = rows()
    changed = nn.CrossEntropyLoss(weight=torch.ones(V))
    trainer = trainer_of(toy(), changed)
    changed.weight, changed.label_smoothing, changed.ignore_index = WEIGHT, 0.5, 3
    expected = trainer_of(
        toy(), nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.5, ignore_index=3)
    )
    assert trainer.evaluate([given]) == expected.evaluate([given])


def test_a_criterion_that_returns_no_single_number_is_refused() -> None:
    model = toy()
    for criterion in (nn.CrossEntropyLoss(reduction="none"), lambda logits, targets: None):
        with pytest.raises(UserError, match=r'^criterion: .*reduction="mean"'):
            trainer_of(model, criterion).train([rows()])


class Padded(nn.Module):
    """A model whose last logit is -inf; its auxiliary loss is a mean over tokens other than 0."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = toy()

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        logits, real = self.inner(tokens), tokens != 0
        auxiliary = (logits.square().mean(-1) * real).sum() / real.sum()
        last = torch.tensor([V - 1])
        return {"logits": logits.index_fill(-1, last, -torch.inf), "aux_loss": auxiliary}


@pytest.mark.parametrize("criterion", [None, nn.CrossEntropyLoss()], ids=["default", "own"])
def test_a_batch_without_targets_adds_nothing_to_its_step(criterion: Any) -> None:
    some = torch.randint(1, V - 1, (2, 5), generator=torch.Generator().manual_seed(0))
    batches = [(some, some), (torch.zeros_like(some), torch.full_like(some, -100))]
    weights = []
    for n in (1, 2):
        model = Padded()
        trainer = trainer_of(model, criterion, accumulate=n)
        trainer.train(batches[:n])
        assert trainer.skipped_steps == 0
        weights.append(model.inner[1].weight.detach())
    torch.testing.assert_close(weights[1], weights[0])


def test_targets_whose_class_weights_are_all_zero_make_no_update() -> None:
    model, data = toy(), rows()
    before = model[1].weight.detach().clone()
    trainer = trainer_of(model, nn.CrossEntropyLoss(weight=torch.zeros(V)))
    with pytest.warns(UserWarning, match=r"step 1\b.*target"):
        trainer.train([data])
    assert torch.equal(model[1].weight, before)
    assert trainer.skipped_steps == 1


def test_a_mean_whose_divisor_is_not_known_is_refused() -> None:
    class Focal(nn.CrossEntropyLoss):
        def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
            return super().forward(logits, targets) ** 2

    with pytest.raises(UserError, match=r'Focal\b.*weights.*reduction="sum"'):
        trainer_of(toy(), Focal(weight=WEIGHT))
    trainer_of(toy(), Focal(weight=WEIGHT, reduction="sum"))
    trainer_of(toy(), Focal())


class Frozen(nn.Module):
    """An encoder that its owner froze and put in evaluation mode, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(V, 8), nn.Linear(8, V)
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.encoder.requires_grad_(False).eval()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return self.head(self.encoder(x.flatten(0, 1)).view(x.shape))


@pytest.mark.parametrize("how", ["train", "train and evaluate", "evaluate", "train_loop"])
def test_parts_in_evaluation_mode_stay_in_it(how: str) -> None:
    model, data = Frozen(), [rows(seed=i) for i in range(4)]
    before = {name: t.clone() for name, t in model.encoder.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    if how == "train_loop":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train_loop(model, data, optimizer, 1, device="cpu", quiet=True)
    elif how == "evaluate":
        trainer_of(model).evaluate(data)
    else:
        every = {"eval": {"every_steps": 1}} if "evaluate" in how else {}
        trainer = trainer_of(model, train={"steps": 4}, sections=every)
        trainer.train(data, data if every else None)
    assert {name: module.training for name, module in model.named_modules()} == modes
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name


class Merging(nn.Linear):
    """A linear layer with an addend that is merged into its weight in evaluation mode, as LoRA."""

    merged = False

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.addend = nn.Parameter(torch.zeros(n_out, n_in))

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if mode == self.merged:
            self.weight.data += -self.addend.data if mode else self.addend.data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.merged else self.weight + self.addend
        return nn.functional.linear(x, weight, self.bias)


@pytest.mark.parametrize("mode", [True, False])
def test_a_module_with_a_train_of_its_own_is_told_that_an_evaluation_ended(mode: bool) -> None:
    model = nn.Sequential(nn.Embedding(V, 8), Merging(8, V))
    model[1].train(mode)
    trainer = trainer_of(model)
    trainer.evaluate([rows()])
    assert model.training
    assert (model[1].training, model[1].merged) == (mode, not mode)
    trainer.train([rows()])
    assert bool(model[1].addend.any()) is mode


def test_a_shared_module_has_its_own_mode_after_an_evaluation() -> None:
    table, head = toy()
    model = nn.Sequential(table, head, nn.Sequential(table).eval())
    table.train()
    with evaluating(model, World()):
        assert not table.training
    assert [table.training, model[2].training] == [True, False]


def test_a_model_wholly_in_evaluation_mode_is_put_in_training_mode() -> None:
    model = toy().eval()
    trainer_of(model).train([rows()])
    assert all(module.training for module in model.modules())


class Averaged(torch.optim.SGD):
    """Trains at its weights, and evaluates at zeros, as if those were their average."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.calls: list[str] = []
        self.kept: list[Tensor] = []

    def eval(self) -> None:
        self.calls.append("eval")
        params = [p for group in self.param_groups for p in group["params"]]
        self.kept = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p in params:
                p.zero_()

    def train(self) -> None:
        self.calls.append("train")
        params = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            for p, kept in zip(params, self.kept, strict=False):
                p.copy_(kept)


def test_an_optimizer_with_modes_is_switched_for_evaluations() -> None:
    model = toy()
    optimizer = Averaged(model.parameters(), lr=0.1)
    trainer = trainer_of(model, optimizer=optimizer)
    trainer.train([rows()], [rows()])
    assert optimizer.calls == ["train", "eval", "train"]
    loss = trainer.metrics.values("val_loss")[-1]
    assert loss == pytest.approx(torch.tensor(float(V)).log().item())
    assert model[1].weight.any()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = toy()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Adapter(Wrapper):
    """As PEFT's: more than one child, and a way to the model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.extra = nn.Linear(2, 2)

    def get_base_model(self) -> nn.Module:
        return self.inner


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "handing on": Wrapper,
    "with a base model": Adapter,
    "compiled and wrapped": lambda model: Wrapper(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_a_wrapped_model_takes_is_known(name: str) -> None:
    data = rows()
    mask = torch.ones_like(data)
    mask[:, 5:] = 0
    weights = []
    for wrap in (lambda model: model, WRAPPERS[name]):
        inner = Plain()
        model = wrap(inner)
        assert [*signature_of(model)] == ["input_ids"]
        trainer_of(model).train([{"input_ids": data, "attention_mask": mask}])
        weights.append(inner.inner[1].weight.detach().clone())
        with pytest.raises(UserError, match=r"left.*attention_mask"):
            trainer_of(model).train([{"input_ids": data, "attention_mask": mask.flip(1)}])
        with pytest.raises(UserError, match="'speaker'"):
            trainer_of(model).train([{"input_ids": data, "speaker": data}])
    torch.testing.assert_close(weights[1], weights[0])


@pytest.mark.parametrize("part", [False, True])
def test_checkpoints_of_compiled_and_plain_models_are_the_same(tmp_path: Path, part: bool) -> None:
    def made(compiled: bool) -> nn.Module:
        model = Plain()
        if compiled and part:
            model.inner = torch.compile(model.inner, backend="eager")
        return torch.compile(model, backend="eager") if compiled and not part else model

    train, batches = {"steps": 4, "ema_decay": 0.5}, [rows(seed=i) for i in range(4)]
    for first in (True, False):
        results = []
        for second in (True, False):
            folder = tmp_path / f"{first}-{second}"
            half = made(first)
            optimizer = torch.optim.AdamW(half.parameters(), lr=0.1)
            trainer = trainer_of(half, optimizer=optimizer, train={**train, "steps": 2})
            trainer.train(batches)
            trainer.save_checkpoint(folder)
            whole = made(second)
            optimizer = torch.optim.AdamW(whole.parameters(), lr=0.1)
            trainer = trainer_of(whole, optimizer=optimizer, train=train)
            trainer.load_checkpoint(folder)
            trainer.train(batches)
            results.append([*whole.parameters(), *trainer.ema.averages.values()])
            assert not any("_orig_mod" in name for name in trainer.ema.averages)
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_our_compiled_model_is_known_as_ours() -> None:
    from fasttrain.config import ModelConfig

    model = Transformer(ModelConfig(vocab_size=V, dim=16, n_layers=1, n_heads=2), seq_len=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = trainer_of(
            torch.compile(model, backend="eager"), train={"activation_checkpointing": "full"}
        )
    assert trainer.model is model


class Routed(nn.Module):
    """Returns a loss of its own beside the logits."""

    def __init__(self, coefficient: float | None) -> None:
        super().__init__()
        self.inner, self.balance = toy(), nn.Parameter(torch.ones(()))
        if coefficient is not None:
            self.config = type("Config", (), {"router_aux_loss_coef": coefficient})()

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(tokens), "aux_loss": self.balance**2}


@pytest.mark.parametrize("coefficient", [None, 0.25])
@pytest.mark.parametrize("n", [1, 2])
def test_a_models_own_auxiliary_loss_is_trained_on(n: int, coefficient: float | None) -> None:
    model, data = Routed(coefficient), rows()
    with torch.no_grad():
        cross_entropy = F.cross_entropy(
            model.inner(data)[:, :-1].flatten(0, 1), data[:, 1:].flatten()
        ).item()
    factor = 1.0 if coefficient is None else coefficient
    trainer = trainer_of(model, accumulate=n)
    trainer.train([*data.chunk(n)])
    assert float(trainer.train_step.loss) == pytest.approx(cross_entropy + factor, rel=1e-5)
    assert model.balance.item() == pytest.approx(1.0 - 2.0 * factor)
    model = Routed(coefficient)
    assert trainer_of(model).evaluate([data])["val_loss"] == pytest.approx(cross_entropy, rel=1e-5)


class WithState(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.inner, self.what = toy(), what
        if isinstance(what, Tensor):
            self.register_buffer("odd", what)

    def get_extra_state(self) -> Any:
        return self.what if not isinstance(self.what, Tensor) else torch.zeros(1)

    def set_extra_state(self, state: Any) -> None:
        pass

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (torch.zeros(2, dtype=torch.complex128), r"model\.odd .*complex128.*persistent=False"),
        (torch.eye(3).to_sparse(), r"model\.odd .*sparse_coo.*persistent=False"),
        ({"a": "dict"}, r"model\._extra_state .*\bdict\b.*buffer"),
    ],
    ids=["complex128", "sparse", "extra state"],
)
def test_what_no_checkpoint_could_hold_is_refused_before_the_first_step(
    what: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        trainer_of(WithState(what), run_dir=tmp_path / "run")
    trainer = trainer_of(WithState(what))  # which nobody asked to save
    trainer.train([rows()])
    with pytest.raises(UserError, match=message):
        trainer.save_checkpoint(tmp_path / "other")
    assert not [*(tmp_path / "other").glob("*step*")]


def test_a_complex_buffer_is_saved_and_loaded_to_the_bit(tmp_path: Path) -> None:
    angles = torch.polar(torch.ones(3), torch.arange(3.0))
    model = WithState(angles)
    trainer = trainer_of(model)
    trainer.train([rows()])
    trainer.save_checkpoint(tmp_path)
    other = WithState(torch.zeros(3, dtype=torch.complex64))
    trainer_of(other).load_checkpoint(tmp_path)
    assert torch.equal(other.odd, angles)


def test_train_loop_takes_the_cpu_where_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = train_loop(model, [rows()], optimizer, 1, quiet=True)
    assert result["steps"] == [1]
    assert capsys.readouterr().err.count("CUDA") == 1
    with pytest.raises(UserError, match="cuda:1"):
        train_loop(model, [rows()], optimizer, 1, device="cuda:1")


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_a_default_dtype_or_device_changes_no_bit(default: Any, tmp_path: Path) -> None:
    results = []
    for changed in (False, True):
        model, data = toy(), [rows(seed=i) for i in range(4)]
        optimizer = FusedAdamW(model.parameters(), lr=0.1)
        criterion = nn.CrossEntropyLoss(weight=WEIGHT)
        device = "cpu"
        if changed and default == "meta":
            device = "meta"
        if changed and device == "cpu":
            torch.set_default_dtype(default)
        try:
            with torch.device(device):
                trainer = trainer_of(
                    model, criterion, optimizer=optimizer, run_dir=tmp_path / str(changed),
                    train={"steps": 3, "ema_decay": 0.5, "max_grad_norm": 0.1},
                    metrics={"accuracy": lambda logits, targets: 0.3},
                )  # fmt: skip
                trainer.train(data, data)
        finally:
            torch.set_default_dtype(torch.float32)
        numbers = trainer.metrics.values("val_loss") + trainer.metrics.values("val_accuracy")
        tensors = [*model.parameters(), *trainer.ema.averages.values()]
        results.append([numbers, [t.detach().tolist() for t in tensors]])
    assert results[0] == results[1]


def test_a_mask_of_infinities_is_saved_and_a_statistic_that_becomes_infinite_is_not(
    tmp_path: Path,
) -> None:
    mask = torch.full((3, 3), -math.inf).triu(1)
    model = WithState(mask)
    model.register_buffer("statistic", torch.zeros(3))
    trainer = trainer_of(model, run_dir=tmp_path / "run")
    trainer.train([rows()])
    other = WithState(torch.zeros(3, 3))
    other.register_buffer("statistic", torch.ones(3))
    trainer_of(other).load_checkpoint(tmp_path / "run")
    assert torch.equal(other.odd, mask)
    model.statistic.fill_(math.inf)
    with pytest.raises(UserError, match=r"model\.statistic .*finite"):
        trainer.save_checkpoint(tmp_path / "other")


def test_a_step_without_targets_does_not_stop_a_training_that_stops_at_nan() -> None:
    model, data = toy(), rows()
    empty = {"input_ids": data, "labels": torch.full_like(data, -100)}
    trainer = trainer_of(model, train={"steps": 2, "on_nonfinite": "stop"})
    with pytest.warns(UserWarning, match=r"step 1\b.*target"):
        trainer.train([empty, {"input_ids": data, "labels": data}])
    assert (trainer.step, trainer.skipped_steps) == (2, 1)


class Described(torch.optim.SGD):
    """Keeps what is no tensor in its state."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] |= {"kind": "matrix", "factors": [torch.ones(2), torch.zeros(2)]}
        return super().step(closure)


def test_optimizer_state_that_is_no_tensor_is_saved_and_loaded(tmp_path: Path) -> None:
    model = toy()
    trainer = trainer_of(model, optimizer=Described(model.parameters(), lr=0.1))
    trainer.train([rows()])
    trainer.save_checkpoint(tmp_path)
    other = toy()
    optimizer = Described(other.parameters(), lr=0.1)
    trainer_of(other, optimizer=optimizer).load_checkpoint(tmp_path)
    for state in optimizer.state.values():
        assert state["kind"] == "matrix"
        assert [t.tolist() for t in state["factors"]] == [[1.0, 1.0], [0.0, 0.0]]
