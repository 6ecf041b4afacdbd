"""Fine-tune a model in Hugging Face's format: import, prepare with its tokenizer, train, export.

MODEL_FOLDER is any downloaded GPT-2, Llama or Qwen3. By default, a tiny Llama is created.

Run: python examples/finetune.py [MODEL_FOLDER [FOLDER]]    (the tiny one needs `transformers`)
"""

import json
import sys
from pathlib import Path

from fasttrain import hf, load_config, prepare, train


def make_tiny_llama(folder: Path) -> Path:
    """Write an untrained Llama with a byte tokenizer, as `save_pretrained` does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fasttrain.data.tokenizer import byte_tokenizer

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, **shape, **heads))
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def main(model: Path | None, folder: Path) -> int:
    """Run the commands; the tuned model ends up in ``folder/tuned-hf``."""
    folder.mkdir(parents=True, exist_ok=True)
    source = model or make_tiny_llama(folder / "tiny-llama")
    run = hf.import_model(source, folder / "imported", seq_len=64)
    texts = f"{Path(json.__file__).parent}/**/*.py"
    tokenizer = ["--tokenizer", str(run / "tokenizer.json")]
    if status := prepare.main([str(run / "data"), *tokenizer, "--input", texts]):
        return status
    config = str(run / "config.toml")
    # The config gives the shape and the run the parameters; the optimizer starts from scratch.
    settings = [f"model.init_from={run}", "run.name=tuned", "run.compile=off", "eval.prompts=[]"]
    steps = ["train.steps=20", "train.micro_batch=8", "optim.lr=1e-3"]
    if status := train.main([config, *settings, *steps]):
        return status
    tuned = Path(load_config(config).run.out_dir) / "tuned"
    print(f"exported to {hf.export_model(tuned, folder / 'tuned-hf')}")
    return 0


if __name__ == "__main__":
    arguments = [Path(argument) for argument in sys.argv[1:]]
    named = arguments[0] if arguments else None
    sys.exit(main(named, arguments[1] if len(arguments) > 1 else Path("finetune")))
