"""Hugging Face import and export: ``python -m fasttrain.hf export RUN OUT``, ``import DIR RUN``.

GPT-2, Llama and Qwen3 are settings of `fasttrain.model.Transformer`: the same weights under other
names. `transformers` itself is not needed; weights are read and written as safetensors only.
"""

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from fasttrain.checkpoint import CheckpointWriter, check_model
from fasttrain.checkpoint.files import FILE, candidates, map_tensors
from fasttrain.command import command, make_parser
from fasttrain.config import ConfigError, TrainConfig, UserError, config_from_dict, config_to_toml
from fasttrain.config.keys import show
from fasttrain.config.untrusted import misfit, read_json
from fasttrain.data.tokenizer import end_of_text_id, load_tokenizer
from fasttrain.generate import load_model
from fasttrain.model.transformer import Transformer, hidden_dim
from fasttrain.printing import printable, say
from fasttrain.redact import redact

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REMEDY = "give the folder of a downloaded model"
PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>")
REQUIRED = ("seq_len", "dim", "n_layers", "n_heads", "vocab_size")  # in a downloaded config
# Settings that Hugging Face's three architectures lack.
OURS_ALONE = ("embedding_norm", "bigram_vocab_size", "value_embeddings", "logit_softcap")


class Family(NamedTuple):
    """An architecture of Hugging Face as ours."""

    name: str  # of its class
    column: int  # its names in the tables below
    layers: str  # the prefix of the blocks
    defaults: dict[str, Any]  # of their keys, where ours differ
    settings: dict[str, Any]  # ours, which they have no key for
    only: dict[str, tuple[Any, ...]]  # values of their other keys that ours can compute, own first


# Parameter names in our model, in GPT-2, and in Llama and Qwen3. If several of theirs are listed,
# our tensor stacks them by rows.
Names = tuple[tuple[str, str, str], ...]
_OUTER: Names = (
    ("embedding.weight", "transformer.wte.weight", "model.embed_tokens.weight"),
    ("position_embedding.weight", "transformer.wpe.weight", ""),
    ("norm.weight", "transformer.ln_f.weight", "model.norm.weight"),
    ("norm.bias", "transformer.ln_f.bias", ""),
    ("head.weight", "lm_head.weight", "lm_head.weight"),
)
_BLOCK: Names = (  # each has a weight and perhaps a bias
    ("attention_norm", "ln_1", "input_layernorm"),
    ("attention.qkv", "attn.c_attn", "self_attn.q_proj self_attn.k_proj self_attn.v_proj"),
    ("attention.q_norm", "", "self_attn.q_norm"),
    ("attention.k_norm", "", "self_attn.k_norm"),
    ("attention.out", "attn.c_proj", "self_attn.o_proj"),
    ("mlp_norm", "ln_2", "post_attention_layernorm"),
    ("mlp.up", "mlp.c_fc", "mlp.gate_proj mlp.up_proj"),
    ("mlp.down", "mlp.c_proj", "mlp.down_proj"),
)
_KEYS: Names = (  # of the config
    ("seq_len", "n_positions", "max_position_embeddings"),
    ("dim", "n_embd", "hidden_size"),
    ("n_layers", "n_layer", "num_hidden_layers"),
    ("n_heads", "n_head", "num_attention_heads"),
    ("n_kv_heads", "", "num_key_value_heads"),
    ("head_dim", "", "head_dim"),
    ("hidden_dim", "n_inner", "intermediate_size"),
    ("norm_eps", "layer_norm_epsilon", "rms_norm_eps"),
    ("rope_theta", "", "rope_theta"),
    ("bias", "", "attention_bias mlp_bias"),
    ("dropout", "resid_pdrop embd_pdrop attn_pdrop", "attention_dropout"),
    ("tied_embeddings", "tie_word_embeddings", "tie_word_embeddings"),
    ("vocab_size", "vocab_size", "vocab_size"),
)
_GPT2 = Family(
    name="GPT2LMHeadModel",
    column=1,
    layers="transformer.h",
    defaults={"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    settings=dict(mlp="gelu", norm="layer", positions="learned", qk_norm=False, bias=True),
    only={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
)
_LLAMA = Family(
    name="LlamaForCausalLM",
    column=2,
    layers="model.layers",
    defaults={"attention_bias": False},
    settings=dict(mlp="swiglu", norm="rms", positions="rope", qk_norm=False),
    only={"hidden_act": ("silu",), "use_sliding_window": (False,)},
)
_QWEN3 = _LLAMA._replace(
    name="Qwen3ForCausalLM",
    settings=_LLAMA.settings | {"qk_norm": True, "bias": False},
    only=_LLAMA.only | {"attention_bias": (False,)},
)
_FAMILIES = {"gpt2": _GPT2, "llama": _LLAMA, "qwen3": _QWEN3}


def _names(table: Names, family: Family) -> dict[str, list[str]]:
    """Return our names of what a family has → theirs."""
    return {row[0]: row[family.column].split() for row in table if row[family.column]}


def _parameter_names(family: Family, n_layers: int) -> dict[str, list[str]]:
    """Return our parameter name → theirs."""
    names = _names(_OUTER, family)
    for i in range(n_layers):
        for ours, theirs in _names(_BLOCK, family).items():
            for kind in ("weight", "bias"):
                their_names = [f"{family.layers}.{i}.{name}.{kind}" for name in theirs]
                names[f"blocks.{i}.{ours}.{kind}"] = their_names
    return names


def _turned(ours: str, tensor: Tensor, family: Family) -> Tensor:
    """Return a tensor as the other side stores it: GPT-2's linear layers are (in, out)."""
    linear = family is _GPT2 and ours.startswith("blocks.") and tensor.ndim == 2
    return tensor.T if linear else tensor


def _model_type_of(model: Transformer) -> str:
    """Return ``gpt2``, ``llama`` or ``qwen3``, whichever has this model's parts."""
    c, lacking = model.config, []
    plain: dict[str, tuple[Any, ...]] = dict.fromkeys(OURS_ALONE, (None, False))
    if (c.sliding_window_tokens or 0) < model.seq_len:
        plain["sliding_window_tokens"] = (None,)
    gpt2 = {"n_kv_heads": (None, c.n_heads), "head_dim": (None, c.dim // c.n_heads)}
    for name, family in _FAMILIES.items():
        known = plain | {key: (value,) for key, value in family.settings.items()}
        known |= gpt2 | {"bias": (False, True)} if family is _GPT2 else {}
        odd = [key for key, values in known.items() if getattr(c, key) not in values]
        if not odd:
            return name
        named = (f"model.{k} = {show(getattr(c, k))}" for k in odd)
        lacking.append(f"{name} has no {', '.join(named)}")
    raise UserError(
        f"this model cannot be exported: {'; '.join(lacking)}; "
        "train one with the parts of base.toml or gpt2-124m.toml"
    )


def _hf_config(
    model: Transformer, model_type: str, dtype: torch.dtype, eot: int | None, pad: int | None
) -> dict[str, Any]:
    c, family = model.config, _FAMILIES[model_type]
    ours = asdict(c) | {"n_kv_heads": c.n_kv_heads or c.n_heads, "seq_len": model.seq_len}
    ours |= {"head_dim": model.head_dim, "hidden_dim": hidden_dim(c)}
    config = {
        "model_type": model_type,
        "architectures": [family.name],
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "pad_token_id": pad,
        **{key: values[0] for key, values in family.only.items()},
        **{key: ours[name] for name, keys in _names(_KEYS, family).items() for key in keys},
    }
    if family is not _GPT2:  # version 5 of transformers reads this, version 4 rope_theta
        config["rope_parameters"] = {"rope_theta": c.rope_theta, "rope_type": "default"}
    return config


def _hf_tensors(model: Transformer, model_type: str, dtype: torch.dtype) -> dict[str, Tensor]:
    c, family, state = model.config, _FAMILIES[model_type], model.state_dict()
    heads = [n * model.head_dim for n in (c.n_heads, *2 * [c.n_kv_heads or c.n_heads])]
    tensors: dict[str, Tensor] = {}
    for ours, theirs in _parameter_names(family, c.n_layers).items():
        tensor = state.pop(ours, None)
        if tensor is None and model_type == "gpt2" and ours.endswith(".bias"):
            weight = model.get_parameter(ours.removesuffix("bias") + "weight")
            tensor = torch.zeros(weight.shape[0])  # GPT-2 has biases everywhere
        if tensor is None:
            continue
        parts = tensor.split(heads if len(theirs) == 3 else tensor.shape[0] // len(theirs))
        for name, part in zip(theirs, parts, strict=True):
            tensors[name] = _turned(ours, part, family).to("cpu", dtype).contiguous()
    assert not state, f"parameters without a counterpart: {sorted(state)}"
    return tensors


def export_model(run: str | Path, out: str | Path, *, dtype: str = "fp32") -> Path:
    """Write a run's model as a folder that ``transformers`` loads; return that folder.

    A run folder stands for its best checkpoint. ``out`` gets config.json, model.safetensors, a
    model card (README.md) and, where the run has one, its tokenizer. Padding is the tokenizer's own
    padding token, or where it has none the token that ends a document.

    Raises:
        UserError: the model has parts that the three architectures lack, or ``out`` exists.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already; name a new folder")
    model = load_model(run)
    model_type = _model_type_of(model)
    tokenizer_file = candidates(Path(run))[0].parent.parent / "tokenizer.json"
    tokenizer = load_tokenizer(tokenizer_file) if tokenizer_file.is_file() else None
    eot = end_of_text_id(tokenizer) if tokenizer is not None else None
    pad = _pad_id(tokenizer, eot) if tokenizer is not None else None
    ids = {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": pad}
    files: dict[str, Any] = {
        "config.json": _hf_config(model, model_type, DTYPES[dtype], eot, pad),
        "generation_config.json": ids,
    }
    with _whole_or_none(out):
        if tokenizer is not None:
            numbers = {key.removesuffix("_id"): number for key, number in ids.items()}
            tokens = {k: tokenizer.id_to_token(n) for k, n in numbers.items() if n is not None}
            files["tokenizer_config.json"] = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": model.seq_len,
                "clean_up_tokenization_spaces": False,
                **tokens,
            }
            files["special_tokens_map.json"] = tokens
            shutil.copyfile(tokenizer_file, out / "tokenizer.json")
        tensors = _hf_tensors(model, model_type, DTYPES[dtype])
        save_file(tensors, weights := out / "model.safetensors", metadata={"format": "pt"})
        umask = os.umask(0)
        os.umask(umask)
        with contextlib.suppress(OSError):  # not all file systems keep modes
            weights.chmod(0o666 & ~umask)  # safetensors leaves it to its owner alone
        for name, value in files.items():
            (out / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        card = _model_card(model, _FAMILIES[model_type], out.name, tokenizer is not None)
        (out / "README.md").write_text(card, encoding="utf-8")
    return out


@contextlib.contextmanager
def _whole_or_none(folder: Path) -> Iterator[None]:
    """Make a new folder; remove it if what is to fill it fails."""
    folder.mkdir(parents=True)
    try:
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise UserError(f"{folder}: cannot be written ({error}); free some space") from error
        raise


def _pad_id(tokenizer: Tokenizer, eot: int | None) -> int | None:
    """Return the id to pad with: a token made for it, else the one that ends a document."""
    ids = map(tokenizer.token_to_id, PAD_TOKENS)
    return next((number for number in ids if number is not None), eot)


def _model_card(model: Transformer, family: Family, name: str, has_tokenizer: bool) -> str:
    """Return the README.md of an export, with the metadata that the Hub reads at its top."""
    c, title = model.config, printable(name)
    n_parameters = sum(p.numel() for p in model.parameters())
    rows = {
        "architecture": f"`{family.name}`",
        "parameters": f"{n_parameters:,}",
        "layers": c.n_layers,
        "width": c.dim,
        "attention heads": c.n_heads,
        "context": f"{model.seq_len:,} tokens",
        "vocabulary": f"{model.vocab_size:,} tokens",
    }
    load = "tokenizer = AutoTokenizer.from_pretrained(path)\n" if has_tokenizer else ""
    names = "AutoModelForCausalLM, AutoTokenizer" if has_tokenizer else "AutoModelForCausalLM"
    generate = """inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
"""
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- fasttrain
---

# {title}

A language model, trained with fasttrain.

| | |
|---|---|
{table}

```python
from transformers import {names}

path = "."  # this folder, or its name on the Hub
{load}model = AutoModelForCausalLM.from_pretrained(path)
{generate if has_tokenizer else ""}```

Before you publish it, add the license, the languages, the training data and the intended uses.
"""


def _their_tensors(folder: Path, model_type: str) -> dict[str, Tensor]:
    """Return the tensors by their names in ``transformers``; files are mapped, not read."""
    index, names, found = folder / "model.safetensors.index.json", ["model.safetensors"], {}
    if index.exists():
        weight_map: Any = read_json(index, REMEDY).get("weight_map")
        if problem := misfit(dict[str, str], weight_map, "weight_map"):
            raise UserError(f"{index}: {problem}; {REMEDY}")
        names = sorted(set(weight_map.values()))
        if odd := [name for name in names if not FILE.fullmatch(name)]:
            raise UserError(f"{index}: {odd[0]!r} is no file of the folder; {REMEDY}")
    for path in map(folder.joinpath, names):
        if not path.is_file():
            remedy = REMEDY
            if any(folder.glob("*.bin")):
                remedy = "the .bin files beside it are pickles, which can run code: load them with "
                remedy += "transformers and save_pretrained(…, safe_serialization=True)"
            raise UserError(f"{path}: no such file; {remedy}")
        for name, tensor in map_tensors(path).items():
            if name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")):
                continue  # masks and tables, not parameters
            if model_type == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
                name = f"transformer.{name}"  # the original files lack the prefix
            if name in found:
                raise UserError(f"{path}: {name} is in another file too; {REMEDY}")
            if not tensor.is_floating_point():
                raise UserError(f"{path}: {name} is {tensor.dtype}, which no parameter is")
            found[name] = tensor
    return found


def _our_tensors(config: TrainConfig, model_type: str, folder: Path) -> dict[str, Tensor]:
    """Return the parameters of a model, once their shapes are proven to fit the config."""
    found, family = _their_tensors(folder, model_type), _FAMILIES[model_type]
    if config.model.tied_embeddings:
        found.pop("lm_head.weight", None)  # some files hold the matrix twice
    state = {}
    for ours, theirs in _parameter_names(family, config.model.n_layers).items():
        parts = [_turned(ours, found.pop(name), family) for name in theirs if name in found]
        if parts:
            try:
                state[ours] = torch.cat([part.float() for part in parts])
            except RuntimeError as error:
                raise UserError(f"{folder}: {theirs[0]} does not fit: {error}") from error
    if found:
        unknown = ", ".join(sorted(found)[:3])
        raise UserError(f"{folder}: its config.json has no place for unknown tensors: {unknown}")
    check_model(config, state, folder)
    return state


def import_model(folder: str | Path, run: str | Path, *, seq_len: int | None = None) -> Path:
    """Make a run folder of a GPT-2, Llama or Qwen3 in Hugging Face's format; return it.

    Its checkpoint can be sampled from, exported and, with ``model.init_from``, trained on; its
    config expects a dataset of its tokenizer in ``run/data``. ``seq_len`` is by default the longest
    that the model was made for.
    """
    folder, run = Path(folder), Path(run)
    if run.exists():
        raise UserError(f"{run} exists already; name a new folder")
    if not folder.is_dir():
        raise UserError(_no_folder(folder))
    hf = read_json(folder / "config.json", REMEDY)
    config = _our_config(hf, folder, run, seq_len)
    tensors = _our_tensors(config, hf["model_type"], folder)
    tokenizer_file = folder / "tokenizer.json"
    if tokenizer_file.is_file():
        load_tokenizer(tokenizer_file)  # refuses what is none, wherever a link leads
    with _whole_or_none(run):
        text = config_to_toml(config, redact)
        writer = CheckpointWriter(run / "checkpoints", keep_last=1, asynchronous=False)
        writer.save(0, {"model": tensors}, {"step": 0, "imported": redact(str(folder))}, text)
        writer.close()
        (run / "config.toml").write_text(text, encoding="utf-8")
        if tokenizer_file.is_file():
            shutil.copyfile(tokenizer_file, run / "tokenizer.json")
    return run


def _no_folder(folder: Path) -> str:
    """Return what to say where there is no such folder: how to download a model from the Hub."""
    name = folder.as_posix()
    if folder.exists():
        return f"{folder}: not a folder; {REMEDY}"
    if not re.fullmatch(r"\w[\w.-]*(?:/\w[\w.-]*)?", name, re.ASCII):
        return f"{folder}: no such folder; {REMEDY}"
    return (
        f"{folder}: no such folder; to download a model of that name from the Hugging Face Hub, "
        f'run hf download {name} --include "*.json" "*.safetensors" --local-dir {name} '
        "(huggingface-cli download in older versions), and then this command again"
    )


def _our_config(hf: Mapping[str, Any], folder: Path, run: Path, seq_len: int | None) -> TrainConfig:
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise UserError(f"{folder}: model_type is {show(model_type)}; use gpt2, llama or qwen3")
    family = _FAMILIES[model_type]
    hf = family.defaults | dict(hf)
    for k, values in family.only.items():
        if hf.get(k, values[0]) not in values:
            known = " or ".join(map(show, values))
            raise UserError(f"{folder}: {k} = {show(hf[k])} is not supported, only {known}")
    if model_type == "llama" and hf.get("mlp_bias", False) != hf["attention_bias"]:
        raise UserError(f"{folder}: biases in attention or MLP alone are not supported")
    if family is not _GPT2:  # in version 5 of transformers among the parameters of the positions
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        is_table = isinstance(rope, dict)
        kind = rope.get("rope_type", rope.get("type", "default")) if is_table else rope
        if kind != "default":
            raise UserError(f"{folder}: rotary positions of type {show(kind)} are not supported")
        hf |= {"rope_theta": rope["rope_theta"]} if rope.get("rope_theta") else {}
    keys = {ours: theirs for ours, (theirs, *_) in _names(_KEYS, family).items()}
    del keys["dropout"]  # is not the model's
    if missing := [keys[ours] for ours in REQUIRED if hf.get(keys[ours]) is None]:
        raise UserError(f"{folder / 'config.json'}: {missing[0]!r} is missing; {REMEDY}")
    model = {o: hf[theirs] for o, theirs in keys.items() if theirs in hf} | family.settings
    data = {"seq_len": model.pop("seq_len"), "path": str(run / "data")}
    sections = {"run": {"name": run.name, "out_dir": str(run.parent)}, "train": {"epochs": 1.0}}
    try:
        config = config_from_dict({**sections, "data": data, "model": model})
    except ConfigError as error:
        raise UserError(f"{folder}: its config.json cannot be: {error}") from error
    most, learned = config.data.seq_len, family is _GPT2
    if seq_len is not None and (seq_len > most or (learned and seq_len < most)):
        known = f"{most} learned positions" if learned else f"{most} positions at most"
        raise UserError(f"--seq-len {seq_len}: the model has {known}; omit it")
    return replace(config, data=replace(config.data, seq_len=seq_len or most))


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = make_parser("hf", "Export to Hugging Face's format, or import from it.")
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="write a run as a folder that transformers loads")
    out.add_argument("run", type=Path)
    out.add_argument("out", type=Path)
    out.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    into = commands.add_parser("import", help="make a run from a downloaded folder")
    into.add_argument("folder", type=Path)
    into.add_argument("run", type=Path)
    into.add_argument("--seq-len", type=int)
    options = parser.parse_args(argv)
    if options.command == "export":
        path = export_model(options.run, options.out, dtype=options.dtype)
        say(f'{path}: load it with AutoModelForCausalLM.from_pretrained("{path}")')
    else:
        path = import_model(options.folder, options.run, seq_len=options.seq_len)
        say(
            f"{path}: sample with python -m fasttrain.generate {path}; train on your text with\n"
            f"python -m fasttrain.prepare {path}/data --tokenizer {path}/tokenizer.json --input …\n"
            f"python -m fasttrain.train {path}/config.toml model.init_from={path} "
            f"run.name={path.name}-tuned"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
