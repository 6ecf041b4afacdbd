"""A training step against the same model in plain torch, and against ours in other settings.

All start from the same parameters and train on the same batch. None may be faster than what
``run.compile = "auto"`` chooses by more than noise, or the test fails; with ``--full`` neither in
the other precision, where the device has instructions for bf16.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels import RMSNorm
from fasttrain_kernels._torch import has_bf16_instructions, native_bf16
from fasttrain_kernels.catalogue import rotate_half
from torch import Tensor, nn

from benchmarks.harness import OURS, ROOT
from fasttrain.config import TrainConfig, load_config
from fasttrain.data.loader import Batch
from fasttrain.device import resolve_device, resolve_precision, set_matmul_precision
from fasttrain.engine.optim import build_optimizers
from fasttrain.engine.step import TrainStep
from fasttrain.model.attention import Attention
from fasttrain.model.runtime import compile_function
from fasttrain.model.transformer import Transformer
from fasttrain.resolve import apply_numerics, resolve

LR = 1e-3
BASE = ROOT / "configs" / "base.toml"
NOISE = 0.05  # by which a median of the ratios in a round may be off
Step = Callable[[], Tensor]  # runs one step; returns the loss, on the device


def shape(dim: int, layers: int, heads: int, vocab: int, seq_len: int, rows: int) -> dict[str, Any]:
    """Return sizes as overrides of a config."""
    return {
        "model.dim": dim, "model.n_layers": layers, "model.n_heads": heads,
        "model.vocab_size": vocab, "data.seq_len": seq_len, "train.micro_batch": rows,
    }  # fmt: skip


GPT2 = {
    "model.mlp": "gelu", "model.norm": "layer", "model.positions": "learned",
    "model.tied_embeddings": "true",
}  # fmt: skip
LLAMA_LIKE = shape(256, 4, 4, 4096, 256, 8)
GPT2_CHARS = GPT2 | shape(128, 4, 4, 65, 64, 12)  # nanoGPT's README command for a CPU
SHAPES: Any = {
    "gpt2-chars": (GPT2_CHARS, None),
    "llama-256": (LLAMA_LIKE, None),
    # Not with its own optimizer, Muon: torch has none that is fast on a CPU.
    "base": ({"model.vocab_size": 2048, "optim.name": "adamw"}, BASE),
}


def config_of(overrides: Mapping[str, object], file: Path | None = None) -> TrainConfig:
    """Return the config of ``file`` (None: the defaults, 1,000 steps) with ``overrides``."""
    # Data is made up here; a path keeps the vocabulary from having to be the default text's.
    defaults = {} if file else {"train.steps": 1000, "data.path": "made-up"}
    given = [f"{key}={value}" for key, value in (defaults | {**overrides}).items()]
    return load_config(file or os.devnull, given)


def parts_of(config: TrainConfig) -> tuple[Transformer, list[Any], Any]:
    """Return model, optimizers and device of a run, the same at every call."""
    torch.manual_seed(0)
    device = resolve_device(config.run.device)
    precision = resolve_precision(config.run.dtype, device)
    model = Transformer(config.model, seq_len=config.data.seq_len).to(device).train()
    return model, build_optimizers(model, config.optim, precision.compute), device


def make_batch(config: TrainConfig) -> Batch:
    """Return a batch of random tokens, the same at every call."""
    torch.manual_seed(0)
    size = (config.train.micro_batch, config.data.seq_len + 1)
    ids = torch.randint(config.model.vocab_size, size).to(resolve_device(config.run.device))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None, 0)


def our_step(config: TrainConfig) -> Step:
    """Return the trainer's step on a batch that stays the same."""
    model, optimizers, device = parts_of(config)
    resolved = resolve(config, device)
    apply_numerics(resolved)
    train_step = TrainStep(model, optimizers, resolved)
    batch = make_batch(config)

    def step() -> Tensor:
        train_step([batch], LR)
        return train_step.loss

    return step


def loop(loss_of: Callable[..., Any], config: TrainConfig, optimizer: Any) -> Step:
    """Return the usual loop's body in the precision of a config; clip, step, clear."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    precision = resolve_precision(config.run.dtype, resolve_device(config.run.device))
    set_matmul_precision(precision)
    batch = make_batch(config)

    def step() -> Tensor:
        with precision.autocast():
            loss = loss_of(batch.tokens, batch.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def plain_step(config: TrainConfig) -> Step:
    """Return the same step in plain torch; its loss is compiled unless ``run.compile`` is off."""
    model, ours, *_ = parts_of(config)
    groups = [
        {"params": g["params"], "weight_decay": g["weight_decay"], "lr": LR * g["lr_scale"]}
        for optimizer in ours
        for g in optimizer.param_groups
    ]
    optim, loss_of = config.optim, partial(plain_loss, model)
    adamw = torch.optim.AdamW(groups, lr=LR, betas=optim.betas, eps=optim.eps, fused=True)
    compiled = config.run.compile != "off"
    return loop(compile_function(loss_of, "default") if compiled else loss_of, config, adamw)


def plain_loss(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy, all logits at once; of the options, those of the shapes."""
    x = model.embedding(tokens)
    if model.position_embedding is not None:
        x = x + model.position_embedding.weight[: tokens.shape[1]]
    for block in model.blocks:
        x = x + _attend(block.attention, _norm(block.attention_norm, x), model)
        h = block.mlp.up(_norm(block.mlp_norm, x))
        if model.config.mlp == "swiglu":
            gate, up = h.chunk(2, -1)
            h = F.silu(gate) * up
        else:
            h = F.gelu(h, approximate="tanh")
        x = x + block.mlp.down(h)
    logits = F.linear(_norm(model.norm, x), model.head_weight).float()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def _norm(module: nn.Module, x: Tensor) -> Any:
    if isinstance(module, RMSNorm):
        return F.rms_norm(x, x.shape[-1:], module.weight, module.eps)
    return module(x)


def _attend(a: Attention, x: Tensor, model: Transformer) -> Tensor:
    q, k, v = (y.unflatten(-1, (-1, a.head_dim)) for y in a.qkv(x).chunk(3, -1))
    if a.q_norm is not None and a.k_norm is not None:
        q, k = _norm(a.q_norm, q), _norm(a.k_norm, k)
    if model.rope_cos is not None and model.rope_sin is not None:
        tables = model.rope_cos[: x.shape[1]], model.rope_sin[: x.shape[1]]
        q, k = (rotate_half(y, *tables) for y in (q, k))
    y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), is_causal=True)
    return a.out(y.transpose(1, 2).flatten(2))


WAYS = {
    "fasttrain {}": (our_step, "off"),
    "fasttrain compiled, {}": (our_step, "default"),
    "torch {}": (plain_step, "off"),
    "torch.compile {}": (plain_step, "default"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_training_step(compare: Any, full: bool, rehearse: bool, name: str) -> None:
    if name == "llama-256" and not full:
        pytest.skip("compiles for most of a minute: --full")
    torch._dynamo.reset()
    overrides, file = SHAPES[name]
    config = config_of(overrides, file)
    device = resolve_device("auto")
    own, left_out = resolve_precision("auto", device).name, {}
    has_both = has_bf16_instructions() if device.type == "cpu" else native_bf16(device)
    ways = {OURS: our_step(config)}
    for dtype in ("fp32", "bf16"):
        if dtype != own and not (full and has_both):
            left_out[dtype] = "--full" if has_both else "this device emulates it"
            continue
        for way, (make, mode) in WAYS.items():
            settings = overrides | {"run.dtype": dtype, "run.compile": mode}
            ways[way.format(dtype)] = make(config_of(settings, file))
    for _ in range(3):  # the same losses, update for update; and compilation is over
        losses = {way: step().item() for way, step in ways.items()}
    tolerance = 2e-3 if own == "fp32" and "torch bf16" not in ways else 2e-2
    exact = next(loss for way, loss in losses.items() if way.startswith("torch "))
    assert all(abs(loss - exact) <= tolerance * exact for loss in losses.values()), losses
    per_call = {"tokens_per_s": config.train.micro_batch * config.data.seq_len}
    options = {"n_calls": 3 if name == "gpt2-chars" else 1, "warmup": 1, "flush": False}
    speedup = compare(ways, left_out=left_out, per_call=per_call, **options)["speedup"]
    assert rehearse or min(speedup.values()) >= 1 - NOISE, f"auto is not the fastest: {speedup}"
