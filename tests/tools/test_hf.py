"""Import from and export to Hugging Face: equal logits both ways, their own tools on the export."""

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.checkpoint import CheckpointWriter
from fasttrain.config import UserError, config_from_dict, config_to_toml
from fasttrain.data.tokenizer import load_tokenizer, train_bpe
from fasttrain.generate import generate, load_model
from fasttrain.hf import export_model, import_model, main
from fasttrain.model.transformer import Transformer

SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 320}
GPT2 = {"norm": "layer", "positions": "learned", "mlp": "gelu", "tied_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {**GPT2, "bias": True},
    "gpt2 without biases": {**GPT2, "norm_eps": 1e-5},
    "llama": {"n_kv_heads": 2, "rope_theta": 500.0},
    "llama with biases, tied": {"bias": True, "tied_embeddings": True},
    "qwen3": {"n_kv_heads": 2, "qk_norm": True, "head_dim": 16, "hidden_dim": 48},
}


def make_run(folder: Path, **model_options: Any) -> Transformer:
    """Write a run folder of an untrained model whose every parameter is random."""
    config = config_from_dict(
        {
            "model": {**SHAPE, **model_options},
            "data": {"seq_len": 24, "path": "somewhere"},
            "train": {"steps": 1},
        }
    )
    torch.manual_seed(1)
    model = Transformer(config.model, seq_len=24)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    writer = CheckpointWriter(folder / "checkpoints", keep_last=1, asynchronous=False)
    writer.save(1, {"model": model.state_dict()}, {"step": 1}, config_to_toml(config))
    writer.close()
    train_bpe(["the quick brown fox jumps over the lazy dog. " * 20], 300).save(
        str(folder / "tokenizer.json")
    )
    return model.eval()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))


def logits(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A Llama as `transformers` has it."""
    make_run(tmp_path / "run", **MODELS["llama"])
    return export_model(tmp_path / "run", tmp_path / "out")


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="needs the extra hf")


@pytest.mark.parametrize("name", MODELS)
def test_export_has_our_logits(
    name: str, tmp_path: Path, tokens: torch.Tensor, transformers: Any
) -> None:
    model = make_run(tmp_path / "run", **MODELS[name])
    out = export_model(tmp_path / "run", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert theirs.config.model_type == name.split()[0]
    with torch.no_grad():
        found = theirs(tokens).logits
    torch.testing.assert_close(found, logits(model, tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_exact(name: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    model = make_run(tmp_path / "run", **MODELS[name])
    export_model(tmp_path / "run", tmp_path / "out")
    back = load_model(import_model(tmp_path / "out", tmp_path / "again"))
    assert torch.equal(logits(back, tokens), logits(model, tokens))
    assert (tmp_path / "again/tokenizer.json").is_file()


def test_an_export_has_the_tokenizer_of_its_run_alone(tmp_path: Path) -> None:
    run = tmp_path / "runs/one"
    make_run(run, **MODELS["llama"])
    for n, source in enumerate((run, run / "checkpoints", run / "checkpoints/step-00000001")):
        assert (export_model(source, tmp_path / f"out{n}") / "tokenizer.json").is_file()
    (run / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert not (export_model(run, tmp_path / "without") / "tokenizer.json").exists()


def test_their_generate_and_tokenizer_work_on_the_export(tmp_path: Path, transformers: Any) -> None:
    model = make_run(tmp_path / "run", **MODELS["qwen3"])
    out = export_model(tmp_path / "run", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("the quick", return_tensors="pt").input_ids
    assert tokenizer.decode(prompt[0]) == "the quick"
    assert tokenizer.eos_token == "<|endoftext|>"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    longer = theirs.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(longer, generate(model, prompt, max_new_tokens=8, greedy=True))


@pytest.mark.parametrize("kind", ["GPT2", "Llama", "Qwen3"])
def test_import_has_their_logits(
    kind: str, tmp_path: Path, tokens: torch.Tensor, transformers: Any
) -> None:
    sizes: dict[str, Any] = {"vocab_size": 300}
    if kind == "GPT2":
        sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
    else:
        sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"intermediate_size": 48, "max_position_embeddings": 24, "head_dim": 16}
        sizes |= {"num_key_value_heads": 2}
    torch.manual_seed(2)
    theirs = getattr(
        transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    )(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        expected = theirs(tokens).logits
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")  # several files and an index
    assert (tmp_path / "theirs/model.safetensors.index.json").is_file()
    model = load_model(import_model(tmp_path / "theirs", tmp_path / "run"))
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-4, rtol=1e-4)


def test_command_line_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", **MODELS["llama"])
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    arguments = ["import", str(tmp_path / "out"), str(tmp_path / "again"), "--seq-len", "16"]
    assert main(arguments) == 0
    assert "model.init_from" in capsys.readouterr().out
    assert load_model(tmp_path / "again").seq_len == 16
    assert main(arguments) == 2
    assert re.match(rf"error: {tmp_path}/again .*folder", capsys.readouterr().err)


def test_an_export_is_a_folder_that_the_hub_takes(tmp_path: Path) -> None:
    """It has a padding token, a model card, and files that others may read."""
    make_run(tmp_path / "run", **MODELS["llama"])
    before = os.umask(0o022)
    try:
        out = export_model(tmp_path / "run", tmp_path / "out")
        run = import_model(out, tmp_path / "again")
    finally:
        os.umask(before)
    described = {path.name: path.read_text() for path in out.glob("*.json")}
    numbers = json.loads(described["config.json"])
    assert numbers["pad_token_id"] == numbers["eos_token_id"]
    assert json.loads(described["generation_config.json"])["pad_token_id"] is not None
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert json.loads(described[name])["pad_token"] == "<|endoftext|>"
    card = (out / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    assert "| architecture | `LlamaForCausalLM` |" in card
    for folder in (out, run):
        paths = [path for path in folder.rglob("*") if path.is_file()]
        assert {path.stat().st_mode & 0o777 for path in paths} == {0o644}


def test_a_padding_token_of_the_tokenizer_is_kept(tmp_path: Path) -> None:
    make_run(tmp_path / "run", **MODELS["llama"])
    tokenizer = load_tokenizer(tmp_path / "run/tokenizer.json")
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.save(str(tmp_path / "run/tokenizer.json"))
    out = export_model(tmp_path / "run", tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["pad_token_id"] == tokenizer.token_to_id("<pad>") != config["eos_token_id"]


def test_their_tokenizer_pads_with_the_export(tmp_path: Path, transformers: Any) -> None:
    make_run(tmp_path / "run", **MODELS["qwen3"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        export_model(tmp_path / "run", tmp_path / "out")
    )
    batch = tokenizer(["the quick", "the"], padding=True, return_tensors="pt")
    assert batch.input_ids.shape[0] == 2
    assert batch.attention_mask.min() == 0


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_a_name_that_is_no_folder_says_how_to_download_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^{name}: .*hf download {name} .*--local-dir {name}\b"):
        import_model(name, "run")
    with pytest.raises(UserError, match=rf"^{tmp_path}/none: .*folder"):
        import_model(tmp_path / "none", "run")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^file: .*not a folder"):
        import_model("file", "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value_embeddings": True}, "value_embeddings"),
        ({"mlp": "relu2"}, r'llama .*model\.mlp = "relu2"'),
        ({"sliding_window_tokens": 8}, "sliding_window_tokens = 8"),
        ({"bias": True, "qk_norm": True}, r"qwen3 .*model\.bias = true"),
    ],
)
def test_what_has_no_counterpart_is_named(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_run(tmp_path / "run", **options)
    with pytest.raises(UserError, match=message):
        export_model(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "yarn"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_hidden_layers": 3}, "n_layers = 3"),
        ({"num_hidden_layers": 1}, r"config\.json .*model\.layers\.1\."),
        ({"hidden_size": 64, "head_dim": 8}, r"tensors .*\[model\].*data\.seq_len"),
        ({"hidden_size": None}, "'hidden_size'"),
    ],
)
def test_a_foreign_model_is_refused_with_the_reason(
    change: dict[str, Any], message: str, exported: Path, tmp_path: Path
) -> None:
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        import_model(exported, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_pickle_is_refused_with_the_way_to_convert_it(exported: Path, tmp_path: Path) -> None:
    (exported / "model.safetensors").rename(exported / "pytorch_model.bin")
    with pytest.raises(UserError, match="safe_serialization"):
        import_model(exported, tmp_path / "again")
    (exported / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(UserError, match=r"model\.safetensors: .*header"):
        import_model(exported, tmp_path / "again")


ODD: dict[str, tuple[str, str, dict[str, Any]]] = {
    "no heads": ("llama", "config.json", {"num_attention_heads": 0}),
    "heads of text": ("llama", "config.json", {"num_attention_heads": "4"}),
    "text for width": ("gpt2", "config.json", {"n_embd": "32"}),
    "no head_dim": ("llama", "config.json", {"head_dim": 0}),
    "rope as a list": ("llama", "config.json", {"rope_parameters": [1]}),
    "positions of text": ("llama", "config.json", {"max_position_embeddings": "24"}),
    "more positions than parameters": (
        "llama",
        "config.json",
        {"max_position_embeddings": 10**9},
    ),
    "huge": ("llama", "config.json", {"hidden_size": 2**40}),
    "large": ("llama", "config.json", {"vocab_size": 2**32}),
    "too deep": ("llama", "config.json", {"num_hidden_layers": 10**9}),
    "no map": ("llama", "model.safetensors.index.json", {}),
    "a map of lists": ("llama", "model.safetensors.index.json", {"weight_map": {"a": ["b"]}}),
    "a map that leaves": (
        "llama",
        "model.safetensors.index.json",
        {"weight_map": {"a": "../x.safetensors"}},
    ),
}


@pytest.mark.parametrize(("name", "file", "change"), ODD.values(), ids=ODD)
def test_an_odd_folder_is_one_line(
    name: str, file: str, change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", **MODELS[name])
    path = export_model(tmp_path / "run", tmp_path / "out") / file
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(value | change))
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "again")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}")
    assert not (tmp_path / "again").exists()


def test_a_tensor_in_two_files_is_refused(exported: Path, tmp_path: Path) -> None:
    (exported / "copy.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    index = {"weight_map": {"a": "model.safetensors", "b": "copy.safetensors"}}
    (exported / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"\.safetensors: .*another file"):
        import_model(exported, tmp_path / "again")


def test_a_full_disk_leaves_no_half_made_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run")
    export_model(tmp_path / "run", exported := tmp_path / "exported")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    for command, source in (("export", tmp_path / "run"), ("import", exported)):
        assert main([command, str(source), str(tmp_path / "out")]) == 2
        shown = capsys.readouterr().err
        assert re.search("No space left on device.*free", shown)
        assert len(shown.splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_what_is_no_tokenizer_is_not_copied_from_where_a_link_leads(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    export_model(tmp_path / "run", exported := tmp_path / "exported")
    (secret := tmp_path / "secret").write_text("secret")
    (exported / "tokenizer.json").unlink()
    (exported / "tokenizer.json").symlink_to(secret)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        import_model(exported, tmp_path / "again")
    assert not (tmp_path / "again").exists()
