"""To and from Hugging Face: ``python -m fasttrain.hf export RUN OUT`` and ``import DIR RUN``.

GPT-2, Llama and Qwen3 are settings of `fasttrain.model.Transformer`: the same numbers under other
names. `transformers` itself is not needed; weights are read and written as safetensors only.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fasttrain.checkpoint import CheckpointWriter
from fasttrain.command import command, prog
from fasttrain.config import UserError, config_to_toml
from fasttrain.data.tokenizer import END_OF_TEXT, end_of_text_id, load_tokenizer
from fasttrain.generate import load_model
from fasttrain.hf_layout import (
    hf_config,
    is_transposed,
    model_type_of,
    our_config,
    parameter_names,
    part_rows,
)
from fasttrain.model import Transformer
from fasttrain.redact import redact

__all__ = ["export_model", "import_model", "main"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---- export ----------------------------------------------------------------------------------


def _hf_tensors(model: Transformer, model_type: str, dtype: torch.dtype) -> dict[str, Tensor]:
    state = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for ours, theirs in parameter_names(model_type, model.config.n_layers).items():
        tensor = state.pop(ours, None)
        if tensor is None and model_type == "gpt2" and ours.endswith(".bias"):
            weight = model.get_parameter(ours.removesuffix("bias") + "weight")
            tensor = torch.zeros(weight.shape[0])  # GPT-2 has biases everywhere
        if tensor is None:
            continue
        rows = part_rows(model, ours) if len(theirs) > 1 else None
        parts = tensor.split(rows) if rows else (tensor,)
        for name, part in zip(theirs, parts, strict=True):
            part = part.T if is_transposed(model_type, name) else part
            tensors[name] = part.to("cpu", dtype).contiguous()
    assert not state, f"parameters without a counterpart: {sorted(state)}"
    return tensors


def export_model(run: str | Path, out: str | Path, *, dtype: str = "fp32") -> Path:
    """Write a run's model as a folder that ``transformers`` loads: GPT-2, Llama or Qwen3.

    Args:
        run: a run folder (its best checkpoint) or a checkpoint folder.
        out: a folder that does not exist yet.
        dtype: of the weights: ``fp32``, ``bf16`` or ``fp16``.

    Returns:
        ``out``, with config.json, model.safetensors and, where the run has one, its tokenizer.

    Raises:
        UserError: the model has parts that the three architectures lack, or ``out`` exists.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already; name a new folder")
    model = load_model(run)
    model_type = model_type_of(model)
    folders = (Path(run), Path(run).parent.parent)  # of a run, of a checkpoint
    files = [f / "tokenizer.json" for f in folders if (f / "tokenizer.json").is_file()]
    tokenizer_file = files[0] if files else None
    eot, special = None, None
    if tokenizer_file is not None:
        tokenizer = load_tokenizer(tokenizer_file)
        eot = end_of_text_id(tokenizer)
        special = END_OF_TEXT if eot is None else tokenizer.id_to_token(eot)
    out.mkdir(parents=True)
    tensors = _hf_tensors(model, model_type, DTYPES[dtype])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    _write_json(out / "config.json", hf_config(model, model_type, DTYPES[dtype], eot))
    _write_json(out / "generation_config.json", {"bos_token_id": eot, "eos_token_id": eot})
    if tokenizer_file is not None:
        shutil.copyfile(tokenizer_file, out / "tokenizer.json")
        described: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.seq_len,
            "clean_up_tokenization_spaces": False,
        }
        if eot is not None:
            described |= {"bos_token": special, "eos_token": special}
        _write_json(out / "tokenizer_config.json", described)
    return out


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# ---- import ----------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the folder of a downloaded model") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, not an object")
    return value


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(_read_json(index)["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise UserError(f"{index}: names a file outside the folder")
        return [folder / name for name in names]
    return [folder / "model.safetensors"]


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        if not path.is_file():
            pickled = any(folder.glob("*.bin"))
            raise UserError(
                f"{path}: no such file"
                + ("; the .bin files beside it are pickles, which can run code: load them with "
                   "transformers and save_pretrained(…, safe_serialization=True)"
                   if pickled else "; give the folder of a downloaded model")
            )  # fmt: skip
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a safetensors file ({error})") from error
    return tensors


def _load_into(model: Transformer, model_type: str, found: dict[str, Tensor]) -> None:
    if model_type == "gpt2":  # the original files lack the prefix, and hold masks as buffers
        found = {
            name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": t
            for name, t in found.items()
            if not name.endswith((".attn.bias", ".attn.masked_bias"))
        }
    state: dict[str, Tensor] = {}
    wanted = model.state_dict()
    for ours, theirs in parameter_names(model_type, model.config.n_layers).items():
        parts = [found.pop(name) for name in theirs if name in found]
        if ours in wanted and len(parts) == len(theirs):
            whole = [
                p.T if is_transposed(model_type, n) else p
                for n, p in zip(theirs, parts, strict=True)
            ]
            state[ours] = torch.cat(whole) if len(whole) > 1 else whole[0]
        elif ours == "head.weight":
            continue  # tied: some files hold it twice
        elif parts:
            raise UserError(f"the model holds {theirs[0]}, of which its config.json says nothing")
    missing = sorted(set(wanted) - set(state))
    left = sorted(name for name in found if not name.endswith("rotary_emb.inv_freq"))
    if missing or left:
        raise UserError(
            f"the model's tensors do not fit its config.json: missing {missing[:3] or 'none'}, "
            f"unknown {left[:3] or 'none'}"
        )
    try:
        model.load_state_dict({name: t.float() for name, t in state.items()})
    except RuntimeError as error:
        raise UserError(f"the model's tensors do not fit its config.json: {error}") from error


def import_model(folder: str | Path, run: str | Path, *, seq_len: int | None = None) -> Path:
    """Make a run folder of a GPT-2, Llama or Qwen3 in Hugging Face's format.

    Args:
        folder: with config.json and model.safetensors (or shards and their index).
        run: a folder that does not exist yet.
        seq_len: the longest sequence, in tokens; None: as long as the model was made for.

    Returns:
        ``run``: its checkpoint can be sampled from, exported, and trained on with
        ``model.init_from``; its config expects a dataset of its tokenizer in ``run/data``.

    Raises:
        UserError: the model has parts that ours lacks, its files do not fit, or ``run`` exists.
    """
    folder, run = Path(folder), Path(run)
    if run.exists():
        raise UserError(f"{run} exists already; name a new folder")
    hf = _read_json(folder / "config.json")
    try:
        config = our_config(hf, folder, run, seq_len)
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'}: {error} is missing") from error
    tensors = _read_tensors(folder)
    with torch.random.fork_rng(devices=[]):
        model = Transformer(config.model, seq_len=config.data.seq_len)
    _load_into(model, hf["model_type"], tensors)
    config = replace(config, run=replace(config.run, name=run.name, out_dir=str(run.parent)))
    run.mkdir(parents=True)
    text = config_to_toml(config, redact)
    writer = CheckpointWriter(run / "checkpoints", keep_last=1, asynchronous=False)
    writer.save(
        0, {"model": model.state_dict()}, {"step": 0, "imported": redact(str(folder))}, text
    )
    writer.close()
    (run / "config.toml").write_text(text, encoding="utf-8")
    if (folder / "tokenizer.json").is_file():
        shutil.copyfile(folder / "tokenizer.json", run / "tokenizer.json")
    return run


# ---- command line ----------------------------------------------------------------------------


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog=prog("hf"), description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="a run → a folder for transformers")
    out.add_argument("run", type=Path)
    out.add_argument("out", type=Path)
    out.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    into = commands.add_parser("import", help="a folder of transformers → a run")
    into.add_argument("folder", type=Path)
    into.add_argument("run", type=Path)
    into.add_argument("--seq-len", type=int)
    options = parser.parse_args(argv)
    if options.command == "export":
        path = export_model(options.run, options.out, dtype=options.dtype)
        print(f'{path}: load it with AutoModelForCausalLM.from_pretrained("{path}")')
    else:
        path = import_model(options.folder, options.run, seq_len=options.seq_len)
        name = f"run.name={path.name}-tuned"
        print(f"{path}: sample with python -m fasttrain.generate {path}; train on your text with")
        print(
            f"python -m fasttrain.prepare {path}/data --tokenizer {path}/tokenizer.json --input …"
        )
        print(f"python -m fasttrain.train {path}/config.toml model.init_from={path} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
