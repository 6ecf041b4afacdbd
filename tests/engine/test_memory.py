"""Memory foreseen on fake tensors against memory measured, category by category."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fasttrain.config import TrainConfig, config_from_dict
from fasttrain.engine.optim import build_optimizers
from fasttrain.engine.step import TrainStep
from fasttrain.model.transformer import Transformer
from fasttrain.preflight import memory
from fasttrain.preflight.memory import device_memory, estimate_memory, measure_peak, probe_step
from fasttrain.resolve import Resolved, resolve

CPU = torch.device("cpu")
SHAPE = {"vocab_size": 2048, "dim": 64, "n_layers": 3, "n_heads": 4}
BASE = {"qk_norm": True, "value_embeddings": True, "bigram_vocab_size": 512, "mlp": "relu2"}
GPT2 = {"positions": "learned", "norm": "layer", "mlp": "gelu", "bias": True}
GPT2 |= {"tied_embeddings": True, "dropout": 0.1}


def config_of(model: dict[str, Any], **sections: dict[str, Any]) -> TrainConfig:
    values: dict[str, Any] = {
        "run": {"compile": "off", "dtype": "fp32", "device": "cpu"},
        "model": SHAPE | model,
        "data": {"path": "unused", "seq_len": 64},
        "train": {"steps": 1, "micro_batch": 4},
    }
    for name, table in sections.items():
        values[name] = values.get(name, {}) | table
    return config_from_dict(values)


CASES = {
    "llama": config_of({"n_kv_heads": 2}),
    "base with Muon": config_of(BASE, optim={"name": "muon"}),
    "gpt2": config_of(GPT2),
    "accumulated": config_of({}, train={"tokens_per_step": 1024}),
    "bf16": config_of({}, run={"dtype": "bf16"}),
    "one row, where the update is the peak": config_of(
        {"dim": 256}, optim={"name": "muon"}, train={"micro_batch": 1}, data={"seq_len": 16}
    ),
    "documents apart": config_of({}, data={"attention_across_documents": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_within_a_tenth_of_what_is_measured(name: str) -> None:
    config = CASES[name]
    estimate = estimate_memory(config, device=CPU)
    peak = probe_step(config, device=CPU).peak_bytes
    assert estimate.total == pytest.approx(peak, rel=0.10)


def test_the_categories_are_what_they_are_called() -> None:
    config = CASES["base with Muon"]
    config = replace(config, train=replace(config.train, z_loss=1e-4))  # so that logits are cut
    estimate = estimate_memory(config, device=CPU)
    model = Transformer(config.model, seq_len=64)
    n = model.num_parameters()
    hidden = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    assert estimate.parameters == 4 * n
    assert estimate.optimizer == 8 * (n - hidden) + 4 * hidden
    assert estimate.logits == 4 * 64 * 2048 * 4
    wide = replace(config, train=replace(config.train, micro_batch=8))
    more = estimate_memory(wide, device=CPU)
    assert more.activations > 1.8 * estimate.activations
    assert (more.parameters, more.optimizer) == (estimate.parameters, estimate.optimizer)
    accumulated = estimate_memory(CASES["accumulated"], device=CPU)
    plain = estimate_memory(CASES["llama"], device=CPU)
    assert accumulated.gradients == accumulated.parameters
    assert plain.gradients == 0  # at the end of the forward pass there are none yet


@pytest.mark.parametrize(
    ("dim", "rows", "seq_len"), [(64, 8, 64), (256, 1, 8)], ids=["forward pass", "gradients"]
)
def test_matrices_rounded_once_a_step_are_counted(
    dim: int, rows: int, seq_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peak is the forward pass, in which autocast holds as much, or gradients meet new ones."""
    run = {"dtype": "bf16", "compile": "default"}
    train = {"micro_batch": rows, "tokens_per_step": 2 * rows * seq_len}
    config = config_of({"dim": dim}, run=run, train=train, data={"seq_len": seq_len})
    eager = replace(config, run=replace(config.run, compile="off"))
    cuda = torch.device("cuda")  # whose fake tensors need a torch that is built for it

    def resolve_as_on_a_gpu(config: TrainConfig, device: torch.device) -> Resolved:
        on_gpu = replace(config, run=replace(config.run, device="cuda", attention="flash"))
        return replace(resolve(config, device), rounds_once=resolve(on_gpu, cuda).rounds_once)

    monkeypatch.setattr(memory, "resolve", resolve_as_on_a_gpu)
    ours, plain = (estimate_memory(c, device=CPU) for c in (config, eager))
    model = Transformer(config.model, seq_len=seq_len)
    rounding = replace(resolve(eager, CPU), rounds_once=True)
    step = TrainStep(model, build_optimizers(model, config.optim), rounding)
    copies = sum(copy.nbytes for copy in step.gradients.copies.values())
    assert ours.buffers - plain.buffers == copies > 0
    if rows > 1:
        assert ours.total == plain.total
    else:
        gradients = sum(4 * p.numel() for p in model.parameters())
        assert (ours.gradients, ours.activations) == (gradients, gradients - copies)


def test_an_estimate_allocates_nothing_and_moves_no_random_state() -> None:
    config = CASES["llama"]
    huge = replace(config, model=replace(config.model, dim=8192, n_layers=8, vocab_size=100_000))
    before = torch.get_rng_state()
    estimates = []
    peak = measure_peak(lambda: estimates.append(estimate_memory(huge, device=CPU)), CPU)
    assert estimates[0].total > 80 * 2**30
    assert peak < 64 * 2**20
    assert torch.equal(torch.get_rng_state(), before)


def test_peaks_are_measured_to_the_byte() -> None:
    kept: list[torch.Tensor] = []

    def run() -> None:
        kept.append(torch.empty(1_000_000, dtype=torch.uint8))
        torch.empty(3_000_000, dtype=torch.uint8)
        kept.append(torch.empty(500_000, dtype=torch.uint8))

    assert measure_peak(run, CPU) == pytest.approx(4_000_000, rel=0.001)


def test_the_memory_of_this_machine_is_known() -> None:
    free = device_memory(CPU)
    assert 2**26 < free < 2**50
