"""Shared by the benchmarks of training steps: the shapes, our step, and the same in plain torch.

The plain step is what one writes without this project: the same parameters in the same modules,
torch's own functions, all logits at once, ``clip_grad_norm_`` and ``AdamW(fused=True)``.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from fasttrain_kernels import RMSNorm
from torch import Tensor, nn

from fasttrain.config import TrainConfig, config_from_dict, load_config
from fasttrain.data.loader import Batch
from fasttrain.device import keep_freed_memory, resolve_device, resolve_precision
from fasttrain.engine.optim import build_optimizers
from fasttrain.engine.step import TrainStep
from fasttrain.model.attention import Attention
from fasttrain.model.runtime import compile_function
from fasttrain.model.transformer import Block, Transformer

ROOT = Path(__file__).parent.parent
LR = 1e-3
Step = Callable[[], Tensor]  # runs one step; returns the loss, on the device

BASE = ROOT / "configs" / "base.toml"
LLAMA_LIKE = {
    "model.vocab_size": 4096, "model.dim": 256, "model.n_layers": 4, "model.n_heads": 4,
    "data.seq_len": 256, "train.micro_batch": 8,
}  # fmt: skip
# nanoGPT's README command for a CPU.
GPT2_CHARS = {
    "model.vocab_size": 65, "model.dim": 128, "model.n_layers": 4, "model.n_heads": 4,
    "model.mlp": "gelu", "model.norm": "layer", "model.positions": "learned",
    "model.tied_embeddings": True, "data.seq_len": 64, "train.micro_batch": 12,
}  # fmt: skip


def config_of(overrides: Mapping[str, object], file: Path | None = None) -> TrainConfig:
    """Return the config of ``file`` (None: the defaults, 1,000 steps) with ``overrides``."""
    if file is not None:
        return load_config(file, [f"{key}={_toml(value)}" for key, value in overrides.items()])
    # Data is made up here; a path keeps the vocabulary from having to be the default text's.
    values: dict[str, dict[str, object]] = {"train": {"steps": 1000}, "data": {"path": "none"}}
    for name, value in overrides.items():
        section, _, key = name.partition(".")
        values.setdefault(section, {})[key] = value
    return config_from_dict(values)


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def make_model(config: TrainConfig) -> Transformer:
    """Return the model of ``config`` on its device, the same at every call."""
    torch.manual_seed(0)
    device = resolve_device(config.run.device)
    if device.type == "cpu":
        keep_freed_memory()  # as in a run; rivals in this process have it too
    model = Transformer(config.model, seq_len=config.data.seq_len).to(device)
    model.train()
    return model


def make_batch(config: TrainConfig, rows: int | None = None) -> Batch:
    """Return a batch of random tokens, the same at every call."""
    assert config.model.vocab_size is not None
    device = resolve_device(config.run.device)
    generator = torch.Generator().manual_seed(0)
    shape = (rows or config.train.micro_batch, config.data.seq_len + 1)
    ids = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
    tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    return Batch(tokens, targets, None, 0)


def our_step(config: TrainConfig) -> Step:
    """Return the trainer's step on a batch that stays the same."""
    model, batch = make_model(config), make_batch(config)
    device = resolve_device(config.run.device)
    precision = resolve_precision(config.run.dtype, device)
    optimizers = build_optimizers(model, config.optim, precision.compute)
    train_step = TrainStep(model, optimizers, config, device=device, precision=precision)

    def step() -> Tensor:
        train_step([batch], LR)
        return train_step.loss

    return step


def plain_step(config: TrainConfig, *, compiled: bool) -> Step:
    """Return the same step in plain torch, eager or with the loss compiled; AdamW throughout."""
    model, batch = make_model(config), make_batch(config)
    device = resolve_device(config.run.device)
    precision = resolve_precision(config.run.dtype, device)
    ours = build_optimizers(model, config.optim)
    groups = [
        {"params": g["params"], "weight_decay": g["weight_decay"], "lr": LR * g["lr_scale"]}
        for optimizer in ours
        for g in optimizer.param_groups
    ]
    optim = config.optim
    adamw = torch.optim.AdamW(groups, lr=LR, betas=optim.betas, eps=optim.eps, fused=True)
    return torch_loop(
        lambda tokens, targets: plain_loss(model, tokens, targets),
        batch,
        list(model.parameters()),
        adamw,
        max_norm=config.train.max_grad_norm,
        autocast=precision.autocast,
        compiled=compiled,
    )


def torch_loop(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    batch: Batch,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    max_norm: float | None,
    autocast: Callable[[], object],
    compiled: bool,
) -> Step:
    """Return the usual loop's body: loss, backward, clip, step, clear."""
    fn = compile_function(loss_of, "default") if compiled else loss_of

    def step() -> Tensor:
        with autocast():  # type: ignore[attr-defined]
            loss = fn(batch.tokens, batch.targets)
        loss.backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


# ---- the Transformer, from torch's functions alone ----------------------------------------------


def plain_loss(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy, all logits at once."""
    logits = F.linear(_hidden(model, tokens), model.head_weight).float()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, RMSNorm):
        return F.rms_norm(x, x.shape[-1:], module.weight, module.eps)
    y: Tensor = module(x)
    return y


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    c, s = (torch.cat((t, t), -1).unsqueeze(-2).to(x.dtype) for t in (cos, sin))
    lo, hi = x.chunk(2, -1)
    return x * c + torch.cat((-hi, lo), -1) * s


def _attend(a: Attention, x: Tensor, model: Transformer, value: Tensor | None) -> Tensor:
    b, t, _ = x.shape
    n_q, n_kv = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
    q, k, v = (y.view(b, t, -1, a.head_dim) for y in a.qkv(x).split([n_q, n_kv, n_kv], -1))
    if a.value_mix is not None and value is not None:
        v = a.value_mix[0] * v + a.value_mix[1] * value.view_as(v)
    if a.q_norm is not None and a.k_norm is not None:
        q, k = _norm(a.q_norm, q), _norm(a.k_norm, k)
    if model.rope_cos is not None and model.rope_sin is not None:
        q, k = (_turn(y, model.rope_cos[:t], model.rope_sin[:t]) for y in (q, k))
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    grouped = n_q != n_kv
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    out: Tensor = a.out(y.transpose(1, 2).reshape(b, t, n_q))
    return out


def _hidden(model: Transformer, tokens: Tensor) -> Tensor:
    config = model.config
    x = model.embedding(tokens)
    if model.position_embedding is not None:
        x = x + model.position_embedding.weight[: tokens.shape[1]]
    if model.bigram_embedding is not None:
        before = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], dim=1)
        pairs = ((before * 36313) ^ (tokens * 27191)) % model.bigram_embedding.num_embeddings
        x = x + model.bigram_embedding(pairs)
    if config.embedding_norm:
        x = F.rms_norm(x, x.shape[-1:], eps=config.norm_eps)
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        value = model.value_embeddings[i](tokens) if len(model.value_embeddings) else None
        x = x + _attend(block.attention, _norm(block.attention_norm, x), model, value)
        h = block.mlp.up(_norm(block.mlp_norm, x))
        if config.mlp == "swiglu":
            gate, up = h.chunk(2, -1)
            h = F.silu(gate) * up
        elif config.mlp == "relu2":
            h = F.relu(h).square()
        else:
            h = F.gelu(h, approximate="tanh")
        x = x + block.mlp.down(h)
    return _norm(model.norm, x)
