"""Training steps: the shapes, ours, the same in plain torch, and those of peers.

The plain step is what one writes without this project: the same parameters in the same modules,
torch's own functions, all logits at once, ``clip_grad_norm_`` and ``AdamW(fused=True)``.
"""

import importlib
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from fasttrain_kernels import RMSNorm
from fasttrain_kernels.catalogue import rotate_half
from torch import Tensor, nn

from benchmarks.harness import CUDA
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
NANOGPT = GPT2 | shape(768, 12, 12, 50304, 1024, 12) | {"train.max_grad_norm": None}
NANOCHAT = shape(768, 12, 6, 32768, 2048, 16) | {
    "model.mlp": "relu2", "model.qk_norm": True, "model.embedding_norm": True,
    "model.value_embeddings": True, "model.zero_init_projections": True,
    "model.logit_softcap": 15.0, "train.max_grad_norm": None, "optim.name": "muon",
}  # fmt: skip
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


def make_model(config: TrainConfig) -> Transformer:
    """Return the model of ``config`` on its device, the same at every call."""
    torch.manual_seed(0)
    device = resolve_device(config.run.device)
    if device.type == "cpu":
        keep_freed_memory()  # as in a run; rivals in this process have it too
    model = Transformer(config.model, seq_len=config.data.seq_len).to(device)
    model.train()
    return model


def make_batch(config: TrainConfig) -> Batch:
    """Return a batch of random tokens, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    size = (config.train.micro_batch, config.data.seq_len + 1)
    ids = torch.randint(config.model.vocab_size, size, generator=generator)
    ids = ids.to(resolve_device(config.run.device))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None, 0)


def parts_of(config: TrainConfig) -> tuple[Transformer, Any, Any, Any]:
    """Return model, optimizers, device and precision, as a run of ``config`` makes them."""
    device = resolve_device(config.run.device)
    precision = resolve_precision(config.run.dtype, device)
    model = make_model(config)
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
    loss_of: Callable[[Tensor, Tensor], Tensor], batch: Batch,
    optimizers: Iterable[torch.optim.Optimizer],
    *, autocast: Callable[[], Any] = nullcontext, max_norm: float | None = None,
) -> Step:  # fmt: skip
    """Return the usual loop's body: loss, backward, clip, step, clear."""
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]

    def step() -> Tensor:
        with autocast():
            loss = loss_of(batch.tokens, batch.targets)
        loss.backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(parameters, max_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def plain_step(config: TrainConfig) -> Step:
    """Return the same step in plain torch; its loss is compiled unless ``run.compile`` is off."""
    model, ours, _, precision = parts_of(config)
    groups = [
        {"params": g["params"], "weight_decay": g["weight_decay"], "lr": LR * g["lr_scale"]}
        for optimizer in ours
        for g in optimizer.param_groups
    ]
    optim, loss_of = config.optim, partial(plain_loss, model)
    adamw = torch.optim.AdamW(groups, lr=LR, betas=optim.betas, eps=optim.eps, fused=True)
    compiled = config.run.compile != "off"
    return loop(
        compile_function(loss_of, "default") if compiled else loss_of, make_batch(config), [adamw],
        autocast=precision.autocast, max_norm=config.train.max_grad_norm,
    )  # fmt: skip


# ---- peers ---------------------------------------------------------------------------------------


def litgpt_step(config: TrainConfig) -> Step:
    """Return a step of litgpt's model of that shape, compiled, with its chunked cross-entropy."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    model, device = config.model, resolve_device(config.run.device)
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
    ).to(device)  # fmt: skip

    def loss_of(tokens: Tensor, targets: Tensor) -> Any:
        return chunked_cross_entropy(peer(tokens), targets)

    adamw = torch.optim.AdamW(peer.parameters(), lr=LR, betas=config.optim.betas, fused=True)
    return loop(
        compile_function(loss_of, "default"), make_batch(config), [adamw],
        autocast=resolve_precision(config.run.dtype, device).autocast,
        max_norm=config.train.max_grad_norm,
    )  # fmt: skip


def nanogpt_step(config: TrainConfig, checkout: Path) -> Step:
    """Return the loop of nanoGPT's ``bench.py``, less its reading of the loss at every step."""
    module, sizes = _module(checkout, "model"), config.model
    gpt = module.GPT(
        module.GPTConfig(
            block_size=config.data.seq_len, vocab_size=sizes.vocab_size, n_layer=sizes.n_layers,
            n_head=sizes.n_heads, n_embd=sizes.dim, dropout=0.0, bias=False,
        )
    ).to(device := "cuda" if CUDA else "cpu")  # fmt: skip
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    optimizer = gpt.configure_optimizers(1e-2, 1e-4, (0.9, 0.95), device)
    model = torch.compile(gpt) if CUDA else gpt
    autocast = partial(torch.autocast, "cuda", dtype=torch.bfloat16) if CUDA else nullcontext
    batch = make_batch(config)
    return loop(lambda *given: model(*given)[1], batch, [optimizer], autocast=autocast)


def nanochat_step(config: TrainConfig, checkout: Path) -> Step:
    """Return a step of nanochat's model with its MuonAdamW.

    Attention is full in all layers, as it advises where FlashAttention-3 is missing.
    """
    # Its optimizer compiles itself: for a rehearsal on a CPU, a minute for nothing.
    plain = lambda fn=None, **_: fn if fn is not None else lambda decorated: decorated  # noqa: E731
    with nullcontext() if CUDA else mock.patch.object(torch, "compile", plain):
        module, sizes = _module(checkout, "nanochat.gpt"), config.model
    with torch.device("meta"):
        gpt = module.GPT(
            module.GPTConfig(
                sequence_len=config.data.seq_len, vocab_size=sizes.vocab_size,
                n_layer=sizes.n_layers, n_head=sizes.n_heads, n_kv_head=sizes.n_heads,
                n_embd=sizes.dim, window_pattern="L",
            )
        )  # fmt: skip
    gpt.to_empty(device="cuda" if CUDA else "cpu")
    gpt.init_weights()
    optimizer = gpt.setup_optimizer()
    model = torch.compile(gpt, dynamic=False) if CUDA else gpt
    return loop(model, make_batch(config), [optimizer])


def _module(checkout: Path, name: str) -> Any:
    sys.path.insert(0, str(checkout))
    return importlib.import_module(name)


# ---- the model of `fasttrain.model`, from torch's functions alone --------------------------------


def plain_loss(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy, all logits at once."""
    logits = F.linear(_hidden(model, tokens), model.head_weight).float()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, RMSNorm):
        return F.rms_norm(x, x.shape[-1:], module.weight, module.eps)
    y: Tensor = module(x)
    return y


def _attend(a: Attention, x: Tensor, model: Transformer, value: Tensor | None) -> Tensor:
    b, t, _ = x.shape
    n_q, n_kv = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
    q, k, v = (y.view(b, t, -1, a.head_dim) for y in a.qkv(x).split([n_q, n_kv, n_kv], -1))
    if a.value_mix is not None and value is not None:
        v = a.value_mix[0] * v + a.value_mix[1] * value.view_as(v)
    if a.q_norm is not None and a.k_norm is not None:
        q, k = _norm(a.q_norm, q), _norm(a.k_norm, k)
    if model.rope_cos is not None and model.rope_sin is not None:
        q, k = (rotate_half(y, model.rope_cos[:t], model.rope_sin[:t]) for y in (q, k))
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
