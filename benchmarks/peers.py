"""Peers as processes of their own: ``python -m benchmarks.peers "HF Trainer"|litgpt CONFIG``.

Each trains at the shape of a config, compiled, in bf16 where the CPU multiplies it faster, else
in fp32. It prints the milliseconds of its steps, the first excepted, as a JSON list.
"""

import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.bench_step import LR, loop
from fasttrain.config import TrainConfig, load_config
from fasttrain.device import resolve_precision
from fasttrain.hf import _hf_config, _model_type_of
from fasttrain.model.transformer import Transformer, hidden_dim


def hf_trainer(config: TrainConfig, ends: list[float]) -> None:
    """Train with Hugging Face's Trainer on the config's file of uint16."""
    import transformers

    seq_len = config.data.seq_len
    ours = Transformer(config.model, seq_len=seq_len)
    sizes = _hf_config(ours, _model_type_of(ours), torch.float32, None) | {"use_cache": False}
    peer = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**sizes))
    ids = np.fromfile(Path(str(config.data.path)) / "train.bin", np.uint16).astype(np.int64)
    windows = torch.from_numpy(ids[: len(ids) // seq_len * seq_len]).view(-1, seq_len)

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args: object, **kwargs: object) -> None:
            ends.append(time.perf_counter())

    bf16 = resolve_precision("auto", torch.device("cpu")).name == "bf16"
    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=config.train.micro_batch,
            max_steps=config.train.steps, learning_rate=1e-3, optim="adamw_torch_fused",
            max_grad_norm=1.0, bf16=bf16, torch_compile=True, use_cpu=True,
            logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        transformers.Trainer(
            model=peer,
            args=options,
            train_dataset=[{"input_ids": window, "labels": window} for window in windows],
            callbacks=[Clock()],
        ).train()


def litgpt(config: TrainConfig, ends: list[float]) -> None:
    """Train litgpt's model with its chunked cross-entropy in the usual loop, on one batch."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    model, llama = config.model, config.model.norm == "rms"
    peer = GPT(
        Config(
            n_layer=model.n_layers, n_head=model.n_heads, n_embd=model.dim,
            block_size=config.data.seq_len, padded_vocab_size=model.vocab_size,
            vocab_size=model.vocab_size, bias=False, parallel_residual=False,
            rotary_percentage=1.0, norm_class_name="RMSNorm" if llama else "LayerNorm",
            mlp_class_name="LLaMAMLP" if llama else "GptNeoxMLP",
            intermediate_size=hidden_dim(model),
        )
    )  # fmt: skip
    adamw = torch.optim.AdamW(peer.parameters(), lr=LR, betas=config.optim.betas, fused=True)
    loss_of = torch.compile(lambda tokens, targets: chunked_cross_entropy(peer(tokens), targets))
    step = loop(loss_of, config, adamw)
    for _ in range(config.train.steps):
        step()
        ends.append(time.perf_counter())


if __name__ == "__main__":
    ends: list[float] = []
    train = {"HF Trainer": hf_trainer, "litgpt": litgpt}[sys.argv[1]]
    train(load_config(Path(sys.argv[2])), ends)
    print(json.dumps([1e3 * (b - a) for a, b in itertools.pairwise(ends)]))
