"""fp8 in training: who is refused, what changes and what does not. Products are emulated here."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fasttrain.config import ConfigError, RunConfig, UserError, config_from_dict
from fasttrain.engine.optim import build_optimizers
from fasttrain.engine.step import TrainStep
from fasttrain.model.runtime import multiply_in_fp8
from fasttrain.model.transformer import Transformer
from fasttrain.resolve import resolve
from fasttrain.train import main
from tests.support.toy import write_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CONFIG = config_from_dict(
    {
        "run": {"compile": "off", "dtype": "fp32", "device": "cpu"},
        "model": {"vocab_size": 96, "dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 128},
        "data": {"path": "unused", "seq_len": 12},
        "train": {"steps": 1, "micro_batch": 3},
        "optim": {"lr": 1e-3},
    }
)
COMPILED = {"device": "auto", "dtype": "bf16", "compile": "default"}
TOKENS = torch.randint(96, (3, 13), generator=torch.Generator().manual_seed(0))
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="needs torchao"
)


def make_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG.model, seq_len=12)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"compile": "off"}, "compile"),
        ({"device": "cpu"}, "CUDA"),
        ({"dtype": "fp32"}, "bf16"),
        ({"dtype": "fp16"}, "bf16"),
    ],
)
def test_settings_that_do_not_go_with_fp8_are_refused(options: dict[str, str], why: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.fp8.*{why}"):
        RunConfig(fp8=True, **options)
    RunConfig(fp8=True, dtype="bf16", device="cuda")


def test_devices_without_fp8_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"run\.fp8 = .*Hopper.*\bcpu\b.*run\.fp8"):
        multiply_in_fp8(make_model(), CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An A100")
    with pytest.raises(UserError, match=r"An A100 \(.*8\.0\)"):
        multiply_in_fp8(make_model(), CUDA)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match="pip install torchao"):
        multiply_in_fp8(make_model(), CUDA)


def test_matrices_that_the_hardware_does_not_take_are_named() -> None:
    config = replace(CONFIG.model, dim=40, hidden_dim=64)
    with pytest.raises(UserError, match=r"blocks\.0\.attention\.qkv .*\b120 × 40\b"):
        multiply_in_fp8(Transformer(config, seq_len=12), CPU, emulate=True)


@needs_torchao
def test_training_is_in_fp8_and_evaluation_is_not() -> None:
    plain, model = make_model(), make_model()
    multiply_in_fp8(model, CPU, emulate=True)
    exact, rounded = plain.hidden(TOKENS[:, :-1]), model.hidden(TOKENS[:, :-1])
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert 1e-3 < error < 0.1  # e4m3 has three bits of mantissa
    with torch.no_grad():
        assert torch.equal(model.eval()(TOKENS[:, :-1]), plain.eval()(TOKENS[:, :-1]))


@needs_torchao
def test_parameters_and_their_names_stay() -> None:
    plain, model = make_model(), make_model()
    before = dict(model.named_parameters())
    multiply_in_fp8(model, CPU, emulate=True)
    multiply_in_fp8(model, CPU, emulate=True)
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(after[name] is before[name] for name in before)
    assert model.num_matmul_parameters() == plain.num_matmul_parameters()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert {t.dtype for t in weights.values() if t.is_floating_point()} == {torch.float32}
    plain.load_state_dict(weights)  # strict: a checkpoint is that of any run
    model.load_state_dict(plain.state_dict())


@needs_torchao
def test_steps_in_fp8_learn_as_those_in_full_precision() -> None:
    from fasttrain.data.loader import Batch

    batch = Batch(TOKENS[:, :-1].contiguous(), TOKENS[:, 1:].contiguous(), None, 0)
    losses = {}
    for kind in ("plain", "fp8"):
        model = make_model()
        if kind == "fp8":
            multiply_in_fp8(model, CPU, emulate=True)
        optimizers = build_optimizers(model, CONFIG.optim)
        step = TrainStep(model, optimizers, resolve(CONFIG, CPU))
        losses[kind] = []
        for _ in range(20):
            step([batch], 3e-3)
            losses[kind].append(step.loss.item())
    assert losses["fp8"] != losses["plain"]
    assert losses["plain"][-1] < 0.7 * losses["plain"][0]
    assert losses["fp8"] == pytest.approx(losses["plain"], rel=0.05)


def test_a_step_asked_for_fp8_does_not_run_without() -> None:
    config = replace(CONFIG, run=replace(CONFIG.run, fp8=True, **COMPILED))
    with pytest.raises(UserError, match="Hopper"):
        TrainStep(make_model(), [], resolve(config, CPU))


def test_the_trainer_refuses_before_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    status = main([str(config), f"run.out_dir={tmp_path}", "run.fp8=true", "run.compile=default"])
    assert status == 2
    assert "run.fp8" in capsys.readouterr().err
