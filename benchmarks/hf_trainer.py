"""A run of Hugging Face's Trainer as a process of its own: ``python -m benchmarks.hf_trainer``.

Prints the milliseconds of each step, from the end of the one before it, as a JSON list.
"""

import argparse
import itertools
import json
import tempfile
import time

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class Windows(Dataset[dict[str, Tensor]]):
    """Windows of a headerless uint16 file."""

    def __init__(self, path: str, length: int) -> None:
        self.tokens = torch.from_numpy(np.fromfile(path, np.uint16).astype(np.int64))
        self.length = length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.tokens[index * self.length : (index + 1) * self.length]
        return {"input_ids": ids, "labels": ids}


def main() -> None:
    """Train on a file of tokens and print the times."""
    import transformers

    parser = argparse.ArgumentParser()
    parser.add_argument("tokens")
    parser.add_argument("--llama", action="store_true", help="Llama; else GPT-2")
    for name in ("dim", "length", "rows", "vocab", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = parser.parse_args()
    if given.llama:
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=given.vocab, hidden_size=given.dim, num_hidden_layers=4,
                num_attention_heads=4, intermediate_size=704,
                max_position_embeddings=given.length,
            )
        )  # fmt: skip
    else:
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=given.vocab, n_embd=given.dim, n_layer=4, n_head=4,
                n_positions=given.length, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        )  # fmt: skip
    model.config.use_cache = False
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args: object, **kwargs: object) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=given.rows, max_steps=given.steps,
            learning_rate=1e-3, optim="adamw_torch_fused", max_grad_norm=1.0,
            logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
            use_cpu=True,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model,
            args=options,
            train_dataset=Windows(given.tokens, given.length),
            callbacks=[Clock()],
        )
        trainer.train()
    print(json.dumps([1e3 * (b - a) for a, b in itertools.pairwise(ends)]))


if __name__ == "__main__":
    main()
