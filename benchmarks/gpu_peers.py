"""One stage of `benchmarks.gpu`: our step beside nanoGPT's or nanochat's, at the shape of theirs.

    python -m benchmarks.gpu_peers nanogpt ../nanoGPT --results DIR

nanoGPT: the shape and the loop of its ``bench.py`` (GPT-2 124M, 12 × 1,024 tokens, compiled, fused
AdamW), less its reading of the loss at every step. nanochat: its model of 12 layers with its
MuonAdamW, full attention in all layers as it advises where FlashAttention-3 is missing, against
ours of the same width, depth, heads, vocabulary and parts, with Muon. Steps take turns.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import measure, store
from benchmarks.subject import Step, config_of, make_batch, our_step

CUDA = torch.cuda.is_available()
Overrides = dict[str, object]


def nanogpt_shape() -> Overrides:
    size: Overrides = {"model.dim": 768, "model.n_layers": 12, "model.n_heads": 12}
    size |= {"model.vocab_size": 50304, "data.seq_len": 1024, "train.micro_batch": 12}
    tiny: Overrides = {"model.dim": 64, "model.n_layers": 2, "model.n_heads": 4}
    tiny |= {"model.vocab_size": 512, "data.seq_len": 32, "train.micro_batch": 2}
    return (size if CUDA else tiny) | {
        "model.mlp": "gelu",
        "model.norm": "layer",
        "model.positions": "learned",
        "model.tied_embeddings": True,
        "train.max_grad_norm": None,
    }


def nanochat_shape() -> Overrides:
    size: Overrides = {"model.dim": 768, "model.n_layers": 12, "model.n_heads": 6}
    size |= {"model.vocab_size": 32768, "data.seq_len": 2048, "train.micro_batch": 16}
    tiny: Overrides = {"model.dim": 64, "model.n_layers": 2, "model.n_heads": 2}
    tiny |= {"model.vocab_size": 512, "data.seq_len": 32, "train.micro_batch": 2}
    return (size if CUDA else tiny) | {
        "model.mlp": "relu2",
        "model.qk_norm": True,
        "model.embedding_norm": True,
        "model.value_embeddings": True,
        "model.zero_init_projections": True,
        "model.logit_softcap": 15.0,
        "train.max_grad_norm": None,
        "optim.name": "muon",
    }


def nanogpt_step(folder: Path, overrides: Overrides) -> Step:
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    config, batch, device = _common(overrides)
    gpt = module.GPT(
        module.GPTConfig(
            block_size=config.data.seq_len, vocab_size=config.model.vocab_size,
            n_layer=config.model.n_layers, n_head=config.model.n_heads, n_embd=config.model.dim,
            dropout=0.0, bias=False,
        )
    ).to(device)  # fmt: skip
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    optimizer = gpt.configure_optimizers(1e-2, 1e-4, (0.9, 0.95), device)
    model = torch.compile(gpt) if CUDA else gpt

    def step() -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16) if CUDA else nullcontext():
            _, loss = model(batch.tokens, batch.targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def nanochat_step(folder: Path, overrides: Overrides) -> Step:
    sys.path.insert(0, str(folder))
    # Its optimizer compiles itself: for a rehearsal on a CPU, a minute for nothing.
    with nullcontext() if CUDA else mock.patch.object(torch, "compile", _not_compiled):
        module = importlib.import_module("nanochat.gpt")
    config, batch, device = _common(overrides)
    with torch.device("meta"):
        gpt = module.GPT(
            module.GPTConfig(
                sequence_len=config.data.seq_len, vocab_size=config.model.vocab_size,
                n_layer=config.model.n_layers, n_head=config.model.n_heads,
                n_kv_head=config.model.n_heads, n_embd=config.model.dim, window_pattern="L",
            )
        )  # fmt: skip
    gpt.to_empty(device=device)
    gpt.init_weights()
    optimizer = gpt.setup_optimizer()
    model = torch.compile(gpt, dynamic=False) if CUDA else gpt

    def step() -> torch.Tensor:
        loss: torch.Tensor = model(batch.tokens, batch.targets)
        loss.backward()
        optimizer.step()
        gpt.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _not_compiled(fn: Any = None, **options: Any) -> Any:
    return fn if fn is not None else lambda decorated: decorated


def _common(overrides: Overrides) -> tuple[Any, Any, str]:
    config = config_of(overrides)
    return config, make_batch(config), "cuda" if CUDA else "cpu"


Make = Callable[[Path, Overrides], Step]
PEERS: dict[str, tuple[str, Callable[[], Overrides], Make]] = {
    "nanogpt": ("nanoGPT", nanogpt_shape, nanogpt_step),
    "nanochat": ("nanochat", nanochat_shape, nanochat_step),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Time ours and the peer's step in turns and write the figures."""
    parser = argparse.ArgumentParser(description="Our step beside a peer's.")
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("folder", type=Path, help="a checkout of it")
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args(argv)
    name, shape, make = PEERS[arguments.peer]
    overrides = shape()
    if not CUDA:
        overrides |= {"run.compile": "off", "run.dtype": "fp32"}
    config = config_of(overrides)
    steps = {"fasttrain": our_step(config), name: make(arguments.folder.resolve(), overrides)}
    for step in steps.values():
        for _ in range(3):
            loss = step()
        assert torch.isfinite(loss), f"the loss is {loss.item()}"
    compared = measure.comparison(
        measure.in_turn(
            steps, budget_s=20.0 if CUDA else 0.0, n_calls=10 if CUDA else 1, warmup=2, flush=False
        )
    )
    tokens = config.train.micro_batch * config.data.seq_len
    rates = {k: tokens / s for k, s in compared["median_s"].items()}
    entry = {"name": f"{name} shape", "shape": overrides, **compared, "tokens_per_s": rates}
    suite = f"step-{arguments.peer}"
    document = store.document(suite, [entry], measure.machine(), measure.ceilings())
    store.write(
        arguments.results / store.folder_of(document["machine"]) / f"{suite}.json", document
    )
    print(f"{name}: {rates}, speed-up {compared['speedup']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
