"""A training step against the same model in plain torch and, where installed, litgpt's.

``fasttrain`` is the trainer's step: forward, backward, norm, verdict, update. ``torch`` is the same
model from torch's own functions, ``torch.compile`` that, compiled as one graph, and ``litgpt`` its
model of that shape in the same loop: see steps.py. All start from the same parameters (litgpt's
excepted) and train on the same batch, in bf16 where the device multiplies it natively, else fp32.

On a GPU ours also stands beside nanoGPT's and nanochat's, at the shapes of theirs, where
``NANOGPT_DIR`` and ``NANOCHAT_DIR`` name checkouts.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import steps
from benchmarks.harness import CUDA, OURS
from benchmarks.steps import BASE, GPT2_CHARS, LLAMA_LIKE, NANOCHAT, NANOGPT, TINY, config_of

SHAPES: dict[str, tuple[dict[str, Any], Path | None]] = {
    "gpt2-chars": (GPT2_CHARS, None),
    "llama-256": (LLAMA_LIKE, None),
    # Its own optimizer, Muon, is a rival of its own below: torch has none that is fast on a CPU.
    "base": ({"model.vocab_size": 2048, "optim.name": "adamw"}, BASE),
}
PEERS = {
    "nanoGPT": (NANOGPT, steps.nanogpt_step),
    "nanochat": (NANOCHAT, steps.nanochat_step),
}


@pytest.mark.parametrize("name", SHAPES)
def test_training_step(compare: Any, full: bool, name: str) -> None:
    if name == "llama-256" and not full:
        pytest.skip("compiles three times for most of a minute: --full")
    torch._dynamo.reset()
    overrides, file = SHAPES[name]
    config = config_of(overrides, file)
    ways = {
        OURS: steps.our_step(config),
        "torch": steps.plain_step(config, compiled=False),
        "torch.compile": steps.plain_step(config, compiled=True),
    }
    left_out = {}
    for _ in range(3):  # the same losses, update for update; and compilation is over
        losses = [step().item() for step in ways.values()]
    tolerance = 2e-2 if CUDA else 2e-3
    assert all(abs(loss - losses[1]) <= tolerance * losses[1] for loss in losses), losses
    if name == "base":
        muon = config_of(overrides | {"optim.name": "muon"}, file)
        ways["fasttrain with Muon"] = steps.our_step(muon)
    else:
        try:
            ways["litgpt"] = steps.litgpt_step(config)
        except ImportError as error:
            left_out["litgpt"] = str(error)
    rates = {"tokens_per_s": config.train.micro_batch * config.data.seq_len}
    n_calls = 3 if name == "gpt2-chars" else 1
    compare(ways, n_calls=n_calls, warmup=1, flush=False, left_out=left_out, per_call=rates)


@pytest.mark.parametrize(
    "peer",
    [
        pytest.param(peer, marks=pytest.mark.figures(f"step-{peer.lower()}", name=f"{peer} shape"))
        for peer in PEERS
    ],
)
def test_peer(compare: Any, benchmark: Any, rehearse: bool, peer: str) -> None:
    if not CUDA and not rehearse:
        pytest.skip("needs a CUDA device")
    if not (checkout := os.environ.get(f"{peer.upper()}_DIR")):
        pytest.skip(f"{peer.upper()}_DIR names no checkout")
    shape, make = PEERS[peer]
    shape = shape if CUDA else shape | TINY
    config = config_of(shape)
    ways = {OURS: steps.our_step(config), peer: make(config, Path(checkout).resolve())}
    for step in ways.values():
        for _ in range(3):
            loss = step()
        assert torch.isfinite(loss), f"the loss is {loss.item()}"
    benchmark.extra_info["shape"] = shape
    rates = {"tokens_per_s": config.train.micro_batch * config.data.seq_len}
    compare(ways, budget_s=20.0, n_calls=10, flush=False, per_call=rates)
