"""GPT-2, Llama and Qwen3 as Hugging Face names them, and as settings of our Transformer.

Ours fuses what is multiplied by one input (q, k and v; gate and value); GPT-2 stores the matrices
of its linear layers transposed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fasttrain.config import ConfigError, TrainConfig, UserError, config_from_dict
from fasttrain.config_keys import show
from fasttrain.model import Transformer, hidden_dim
from fasttrain.untrusted import misfit

__all__ = [
    "REMEDY",
    "hf_config",
    "is_transposed",
    "model_type_of",
    "our_config",
    "parameter_names",
    "part_rows",
]

REMEDY = "give the folder of a downloaded model"
# Settings that Hugging Face's three architectures have no counterpart of.
OURS_ALONE = ("embedding_norm", "bigram_vocab_size", "value_embeddings", "logit_softcap")


# Our parameter → theirs; parts of blocks have a weight and may have a bias, and several of theirs
# lie one under the other in ours.
_GPT2 = {
    "embedding.weight": "transformer.wte.weight",
    "position_embedding.weight": "transformer.wpe.weight",
    "norm.weight": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "head.weight": "lm_head.weight",
}
_GPT2_BLOCK = {
    "attention_norm": ("ln_1",),
    "attention.qkv": ("attn.c_attn",),
    "attention.out": ("attn.c_proj",),
    "mlp_norm": ("ln_2",),
    "mlp.up": ("mlp.c_fc",),
    "mlp.down": ("mlp.c_proj",),
}
_LLAMA = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_LLAMA_BLOCK = {
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "attention.out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}


def parameter_names(model_type: str, n_layers: int) -> dict[str, tuple[str, ...]]:
    """Return our parameter name → theirs, which lie one under the other in ours."""
    gpt2 = model_type == "gpt2"
    names: dict[str, tuple[str, ...]] = {
        ours: (theirs,) for ours, theirs in (_GPT2 if gpt2 else _LLAMA).items()
    }
    layers = "transformer.h" if gpt2 else "model.layers"
    for i in range(n_layers):
        for ours, theirs in (_GPT2_BLOCK if gpt2 else _LLAMA_BLOCK).items():
            for kind in ("weight", "bias"):
                their_names = tuple(f"{layers}.{i}.{name}.{kind}" for name in theirs)
                names[f"blocks.{i}.{ours}.{kind}"] = their_names
    return names


def is_transposed(model_type: str, name: str) -> bool:
    """Whether Hugging Face stores a matrix as (in, out): GPT-2's linear layers."""
    return model_type == "gpt2" and ".h." in name and name.endswith(("c_attn.weight",
        "c_proj.weight", "c_fc.weight"))  # fmt: skip


def part_rows(model: Transformer, ours: str) -> list[int] | None:
    """Return how many rows each part of a fused parameter has; None for one that is whole."""
    config = model.config
    if ".attention.qkv." in ours:
        n_kv = config.n_kv_heads or config.n_heads
        return [n * model.head_dim for n in (config.n_heads, n_kv, n_kv)]
    if ".mlp.up." in ours and config.mlp == "swiglu":
        return [hidden_dim(config)] * 2
    return None


def model_type_of(model: Transformer) -> str:
    """Return ``gpt2``, ``llama`` or ``qwen3``, whichever has this model's parts.

    Raises:
        UserError: none has them; names the settings that stand in the way.
    """
    c = model.config
    faults = [
        f"model.{k} = {getattr(c, k)}" for k in OURS_ALONE if getattr(c, k) not in (None, False)
    ]
    gpt2 = c.positions == "learned" and c.norm == "layer" and c.mlp == "gelu" and not c.qk_norm
    gpt2 &= c.n_kv_heads in (None, c.n_heads) and c.head_dim in (None, c.dim // c.n_heads)
    llama = c.positions == "rope" and c.norm == "rms" and c.mlp == "swiglu"
    if c.sliding_window_tokens is not None and c.sliding_window_tokens < model.seq_len:
        faults.append(f"model.sliding_window_tokens = {c.sliding_window_tokens}")
    if llama and c.qk_norm and c.bias:
        faults.append("model.bias = true together with model.qk_norm")
    if not (gpt2 or llama):
        parts = [f"model.{k} = {getattr(c, k)}" for k in ("positions", "norm", "mlp", "qk_norm")]
        faults.append(" with ".join(parts))
    if faults:
        raise UserError(
            f"this model cannot be exported: neither GPT-2, Llama nor Qwen3 has "
            f"{' nor '.join(faults)}; train one with the parts of base.toml or gpt2-124m.toml"
        )
    return "gpt2" if gpt2 else "qwen3" if c.qk_norm else "llama"


def hf_config(
    model: Transformer, model_type: str, dtype: torch.dtype, eot: int | None
) -> dict[str, Any]:
    c = model.config
    common = {
        "model_type": model_type,
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tied_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "bos_token_id": eot,
        "eos_token_id": eot,
    }
    if model_type == "gpt2":
        return common | {
            "architectures": ["GPT2LMHeadModel"],
            "n_positions": model.seq_len,
            "n_embd": c.dim,
            "n_layer": c.n_layers,
            "n_head": c.n_heads,
            "n_inner": hidden_dim(c),
            "activation_function": "gelu_new",
            "layer_norm_epsilon": c.norm_eps,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout),
        }
    name = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[model_type]
    return common | {
        "architectures": [name],
        "hidden_size": c.dim,
        "intermediate_size": hidden_dim(c),
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads or c.n_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.seq_len,
        "rms_norm_eps": c.norm_eps,
        # Version 5 of transformers reads the first, version 4 the second.
        "rope_parameters": {"rope_theta": c.rope_theta, "rope_type": "default"},
        "rope_theta": c.rope_theta,
        "attention_bias": c.bias,
        "mlp_bias": c.bias,
        "attention_dropout": c.dropout,
    }


def our_config(hf: Mapping[str, Any], folder: Path, run: Path, seq_len: int | None) -> TrainConfig:
    model_type = hf.get("model_type")
    if model_type == "gpt2":
        model, positions = _from_gpt2(hf, folder)
    elif model_type in ("llama", "qwen3"):
        model, positions = _from_llama(hf, folder)
    else:
        raise UserError(
            f"{folder}: model_type is {show(model_type)}; gpt2, llama and qwen3 can be imported"
        )
    model["vocab_size"] = hf["vocab_size"]
    for name, value in (("positions", positions), ("vocab_size", model["vocab_size"])):
        if problem := misfit(int, value, name):
            raise UserError(f"{folder}: {problem}; {REMEDY}")
    if seq_len is not None and seq_len > positions:
        raise UserError(f"--seq-len {seq_len}: the model was made for {positions} tokens at most")
    if seq_len is not None and model_type == "gpt2" and seq_len != positions:
        raise UserError(f"--seq-len {seq_len}: a GPT-2 has {positions} learned positions; omit it")
    data = {"seq_len": seq_len or positions, "path": str(run / "data")}
    try:
        return config_from_dict({"model": model, "data": data, "train": {"epochs": 1.0}})
    except ConfigError as error:
        raise UserError(f"{folder}: its config.json cannot be: {error}") from error


def _refuse_other(hf: Mapping[str, Any], folder: Path, expected: Mapping[str, Any]) -> None:
    for k, value in expected.items():
        if hf.get(k, value) != value:
            raise UserError(f"{folder}: {k} = {show(hf[k])} is not supported, only {show(value)}")


def _from_gpt2(hf: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], int]:
    expected = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    _refuse_other(hf, folder, expected | {"add_cross_attention": False})
    if hf.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"):
        raise UserError(
            f"{folder}: activation_function = {show(hf['activation_function'])} is not supported, "
            "only GELU in its tanh form"
        )
    model = {
        "dim": hf["n_embd"],
        "n_layers": hf["n_layer"],
        "n_heads": hf["n_head"],
        "hidden_dim": hf.get("n_inner"),
        "mlp": "gelu",
        "norm": "layer",
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "positions": "learned",
        "bias": True,
        "tied_embeddings": hf.get("tie_word_embeddings", True),
    }
    return model, hf["n_positions"]


def _from_llama(hf: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], int]:
    _refuse_other(hf, folder, {"hidden_act": "silu", "use_sliding_window": False})
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{folder}: rotary positions are {show(rope)}, which they cannot be")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"{folder}: rotary positions of type {show(kind)} are not supported")
    bias = hf.get("attention_bias", False)
    if hf["model_type"] == "qwen3":
        _refuse_other(hf, folder, {"attention_bias": False})
    elif hf.get("mlp_bias", False) != bias:
        raise UserError(f"{folder}: biases in attention or MLP alone are not supported")
    model = {
        "dim": hf["hidden_size"],
        "n_layers": hf["num_hidden_layers"],
        "n_heads": hf["num_attention_heads"],
        "n_kv_heads": hf.get("num_key_value_heads"),
        "head_dim": hf.get("head_dim"),
        "hidden_dim": hf["intermediate_size"],
        "mlp": "swiglu",
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta") or hf.get("rope_theta", 10000.0),
        "bias": bias,
        "qk_norm": hf["model_type"] == "qwen3",
        "tied_embeddings": hf.get("tie_word_embeddings", False),
    }
    return model, hf["max_position_embeddings"]
