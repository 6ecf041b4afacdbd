"""Training steps: the shapes, ours, and the same in plain torch.

The plain step is what one writes without this project: the same parameters in the same modules,
torch's own functions, all logits at once, ``clip_grad_norm_`` and ``AdamW(fused=True)``.
"""

import sysconfig
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fasttrain_kernels import RMSNorm
from fasttrain_kernels.catalogue import rotate_half
from torch import Tensor, nn

from benchmarks.store import ROOT
from fasttrain.config import TrainConfig, config_from_dict, load_config
from fasttrain.data.format import open_dataset
from fasttrain.data.loader import Batch
from fasttrain.device import keep_freed_memory, resolve_device, resolve_precision
from fasttrain.engine.optim import build_optimizers
from fasttrain.engine.step import TrainStep
from fasttrain.model.attention import Attention
from fasttrain.model.runtime import compile_function
from fasttrain.model.transformer import Transformer

LR = 1e-3
Step = Callable[[], Tensor]  # runs one step; returns the loss, on the device
BASE = ROOT / "configs" / "base.toml"


def shape(dim: int, layers: int, heads: int, vocab: int, seq_len: int, rows: int) -> dict[str, Any]:
    """Return sizes as overrides of a config."""
    return {
        "model.dim": dim, "model.n_layers": layers, "model.n_heads": heads,
        "model.vocab_size": vocab, "data.seq_len": seq_len, "train.micro_batch": rows,
    }  # fmt: skip


GPT2 = {
    "model.mlp": "gelu", "model.norm": "layer", "model.positions": "learned",
    "model.tied_embeddings": True,
}  # fmt: skip
LLAMA_LIKE = shape(256, 4, 4, 4096, 256, 8)
GPT2_CHARS = GPT2 | shape(128, 4, 4, 65, 64, 12)  # nanoGPT's README command for a CPU
NANOGPT = GPT2 | shape(768, 12, 12, 50304, 1024, 12)
# What stands in for shapes that are too large for a CPU, so that every line runs there.
TINY = shape(64, 2, 2, 512, 32, 2) | {"run.compile": "off", "run.dtype": "fp32"}


def config_of(overrides: Mapping[str, object], file: Path | None = None) -> TrainConfig:
    """Return the config of ``file`` (None: the defaults, 1,000 steps) with ``overrides``."""
    if file is not None:
        return load_config(file, [f"{key}={value}" for key, value in overrides.items()])
    # Data is made up here; a path keeps the vocabulary from having to be the default text's.
    values: dict[str, dict[str, object]] = {"train": {"steps": 1000}, "data": {"path": "none"}}
    for name, value in overrides.items():
        section, _, key = name.partition(".")
        values.setdefault(section, {})[key] = value
    return config_from_dict(values)


def dataset_of(folder: Path, ids: np.ndarray, vocab_size: int) -> Any:
    """Return the dataset of ids in a file without a header, as nanoGPT has them."""
    ids.tofile(folder / "train.bin")
    options = {"vocab_size": vocab_size, "cache_dir": folder / "cache"}
    return open_dataset(folder, "train", dtype=ids.dtype.name, **options)


def source_bytes(n_files: int) -> np.ndarray:
    """Return the bytes of some of the standard library's files: real text, no tokenizer."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:n_files]
    return np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)


def make_batch(config: TrainConfig) -> Batch:
    """Return a batch of random tokens, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    size = (config.train.micro_batch, config.data.seq_len + 1)
    ids = torch.randint(config.model.vocab_size, size, generator=generator)
    ids = ids.to(resolve_device(config.run.device))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None, 0)


def parts_of(config: TrainConfig) -> tuple[Transformer, Any, Any, Any]:
    """Return model, optimizers, device and precision of a run, the same at every call."""
    torch.manual_seed(0)
    device = resolve_device(config.run.device)
    if device.type == "cpu":
        keep_freed_memory()  # as in a run; rivals in this process have it too
    precision = resolve_precision(config.run.dtype, device)
    model = Transformer(config.model, seq_len=config.data.seq_len).to(device).train()
    return model, build_optimizers(model, config.optim, precision.compute), device, precision


def our_step(config: TrainConfig) -> Step:
    """Return the trainer's step on a batch that stays the same."""
    model, optimizers, device, precision = parts_of(config)
    train_step = TrainStep(model, optimizers, config, device=device, precision=precision)
    batch = make_batch(config)

    def step() -> Tensor:
        train_step([batch], LR)
        return train_step.loss

    return step


def loop(
    loss_of: Callable[[Tensor, Tensor], Any], config: TrainConfig, optimizer: torch.optim.Optimizer
) -> Step:
    """Return the usual loop's body in the precision of a config; clip, step, clear."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    precision = resolve_precision(config.run.dtype, resolve_device(config.run.device))
    batch, max_norm = make_batch(config), config.train.max_grad_norm

    def step() -> Tensor:
        with precision.autocast():
            loss = loss_of(batch.tokens, batch.targets)
        loss.backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(parameters, max_norm)
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


# ---- the model of `fasttrain.model`, from torch's functions alone --------------------------------


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
    out: Tensor = a.out(y.transpose(1, 2).flatten(2))
    return out
