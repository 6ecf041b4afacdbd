"""A training step against the same model in plain torch and, where installed, litgpt's.

``fasttrain`` is the trainer's step: forward, backward, norm, verdict, update. ``torch`` is the same
model from torch's own functions with all logits at once, ``clip_grad_norm_`` and
``AdamW(fused=True)``; ``torch.compile`` is that, compiled as one graph. ``litgpt`` is its model of
that shape, compiled, with its chunked cross-entropy, in the same loop. All start from the same
parameters (litgpt's excepted) and train on the same batch, in bf16 where the device multiplies it
natively, else in fp32.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.rivals import CUDA
from benchmarks.subject import (
    BASE,
    GPT2_CHARS,
    LLAMA_LIKE,
    LR,
    Step,
    config_of,
    make_batch,
    our_step,
    plain_step,
    torch_loop,
)
from fasttrain.config import TrainConfig
from fasttrain.device import resolve_device, resolve_precision

SHAPES: dict[str, tuple[dict[str, object], Path | None]] = {
    "gpt2-chars": (dict(GPT2_CHARS), None),
    "llama-256": (dict(LLAMA_LIKE), None),
    # Its own optimizer, Muon, is a rival of its own below: torch has none that is fast on a CPU.
    "base": ({"model.vocab_size": 2048, "optim.name": "adamw"}, BASE),
}


def litgpt_step(config: TrainConfig) -> Step:
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    model, optim = config.model, config.optim
    llama = model.norm == "rms"
    peer = GPT(
        Config(
            n_layer=model.n_layers, n_head=model.n_heads, n_embd=model.dim,
            block_size=config.data.seq_len, padded_vocab_size=model.vocab_size,
            vocab_size=model.vocab_size, bias=False, parallel_residual=False,
            rotary_percentage=1.0, norm_class_name="RMSNorm" if llama else "LayerNorm",
            mlp_class_name="LLaMAMLP" if llama else "GptNeoxMLP",
            intermediate_size=704 if llama else 4 * model.dim,
        )
    ).to(resolve_device(config.run.device))  # fmt: skip

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = chunked_cross_entropy(peer(tokens), targets)
        return loss

    parameters = list(peer.parameters())
    precision = resolve_precision(config.run.dtype, resolve_device(config.run.device))
    adamw = torch.optim.AdamW(parameters, lr=LR, betas=optim.betas, fused=True)
    return torch_loop(
        loss_of,
        make_batch(config),
        parameters,
        adamw,
        max_norm=config.train.max_grad_norm,
        autocast=precision.autocast,
        compiled=True,
    )


@pytest.mark.parametrize("name", SHAPES)
def test_training_step(compare: Any, full: bool, name: str) -> None:
    if name == "llama-256" and not full:
        pytest.skip("compiles three times for most of a minute: --full")
    torch._dynamo.reset()
    overrides, file = SHAPES[name]
    config = config_of(overrides, file)
    steps: dict[str, Step] = {
        "fasttrain": our_step(config),
        "torch": plain_step(config, compiled=False),
        "torch.compile": plain_step(config, compiled=True),
    }
    left_out = {}
    for _ in range(3):  # the same losses, update for update; and compilation is over
        losses = [step().item() for step in steps.values()]
    exact = losses[1]
    tolerance = 2e-2 if CUDA else 2e-3
    assert all(abs(loss - exact) <= tolerance * exact for loss in losses), losses
    if name == "base":
        steps["fasttrain with Muon"] = our_step(config_of(overrides | {"optim.name": "muon"}, file))
    else:
        try:
            steps["litgpt"] = litgpt_step(config)
        except ImportError as error:
            left_out["litgpt"] = str(error)
    rates = {"tokens_per_s": config.train.micro_batch * config.data.seq_len}
    n_calls = 3 if name == "gpt2-chars" else 1
    compare(steps, n_calls=n_calls, warmup=1, flush=False, left_out=left_out, per_call=rates)
