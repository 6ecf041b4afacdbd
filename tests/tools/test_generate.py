"""fasttrain.generate: sampling rules, the cache against no cache, texts and the command."""

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrain import load_model
from fasttrain.checkpoint import CheckpointWriter
from fasttrain.config import ModelConfig, UserError, config_from_dict, config_to_toml
from fasttrain.data.tokenizer import byte_tokenizer
from fasttrain.generate import (
    Decoder,
    encode_prompt,
    generate,
    main,
    sample_tokens,
    stream,
    stream_texts,
)
from fasttrain.model.transformer import Transformer

# log of 0.5, 0.3, 0.15, 0.05, shuffled
LOGITS = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
STYLES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"n_kv_heads": 2, "qk_norm": True, "tied_embeddings": True},
    "gpt2": {"norm": "layer", "positions": "learned", "mlp": "gelu", "bias": True},
    "gemma2": {"logit_softcap": 5.0, "sliding_window_tokens": 5, "dropout": 0.5},
}


def small_model(style: str = "llama", *, seq_len: int = 12, **options: Any) -> Transformer:
    """A model whose logits are far apart, so that a wrong context shows."""
    torch.manual_seed(0)
    settings = {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, **STYLES[style]}
    model = Transformer(ModelConfig(**{**settings, **options}), seq_len=seq_len).eval()
    with torch.no_grad():
        model.head_weight.normal_()
    return model


def prompts(batch: int, length: int) -> Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(1))


def drawn(logits: Tensor, n: int = 20_000, **options: Any) -> Tensor:
    """Frequencies of each token in ``n`` draws."""
    generator = torch.Generator().manual_seed(2)
    tokens = sample_tokens(logits.expand(n, -1), generator=generator, **options)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / n


# ---- sampling ------------------------------------------------------------------------------------

# 20,000 draws: a frequency's standard deviation is at most 0.0036; 0.015 is four of them.
CLOSE = {"rtol": 0.0, "atol": 0.015}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.15, 0.5, 0.05, 0.3]),
        ({"temperature": 0.5}, (2 * LOGITS[0]).softmax(-1).tolist()),
        ({"temperature": 2.0}, (LOGITS[0] / 2).softmax(-1).tolist()),
        ({"top_k": 1}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_k": 2}, [0.0, 0.625, 0.0, 0.375]),
        ({"top_k": 99}, [0.15, 0.5, 0.05, 0.3]),
        ({"top_p": 0.01}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_p": 0.6}, [0.0, 0.625, 0.0, 0.375]),  # 0.5 is too little: 0.3 comes too
        ({"top_p": 0.9}, [0.15 / 0.95, 0.5 / 0.95, 0.0, 0.3 / 0.95]),
        ({"top_p": 1.0}, [0.15, 0.5, 0.05, 0.3]),
        # After top-k the two kept have 0.625 and 0.375, of which the first reaches 0.6.
        ({"top_k": 2, "top_p": 0.6}, [0.0, 1.0, 0.0, 0.0]),
        # At temperature 0.5 the likeliest has 0.685 and alone reaches 0.6.
        ({"temperature": 0.5, "top_p": 0.6}, [0.0, 1.0, 0.0, 0.0]),
    ],
)
def test_tokens_are_drawn_by_their_probabilities(
    options: dict[str, Any], expected: list[float]
) -> None:
    frequencies = drawn(LOGITS, **options)
    torch.testing.assert_close(frequencies, torch.tensor(expected), **CLOSE)
    assert (frequencies[torch.tensor(expected) == 0.0] == 0.0).all()


def test_each_row_is_restricted_by_itself() -> None:
    logits = torch.stack([LOGITS[0], LOGITS[0].flip(0)])
    assert sample_tokens(logits, top_k=1).tolist() == [1, 2]
    assert sample_tokens(logits, top_p=0.4).tolist() == [1, 2]
    assert sample_tokens(logits, greedy=True).tolist() == [1, 2]
    assert sample_tokens(logits, temperature=0.0).tolist() == [1, 2]


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        sample_tokens(LOGITS, **options)


# ---- the cache and sliding -----------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 1, 1, 4], [11, 1]])
def test_cached_logits_equal_uncached_ones(style: str, pieces: list[int]) -> None:
    model, tokens = small_model(style), prompts(3, 12)
    with torch.no_grad():
        expected = model(tokens)
        cache = model.new_cache(3, 12)
        logits = torch.cat([model(t, cache) for t in tokens.split(pieces, 1)], dim=1)
    assert cache.length == 12
    # fp32 rounding: logits are of size 10, a few hundred products each.
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=5e-5)


def uncached(model: Transformer, tokens: Tensor, n: int) -> Tensor:
    """Greedy generation that encodes the whole context for every token, sliding as documented."""
    context = tokens[:, -model.seq_len :]
    for _ in range(n):
        if context.shape[1] > model.seq_len:
            context = context[:, -(model.seq_len // 2) :]
        with torch.no_grad():
            best = model(context)[:, -1].argmax(-1, keepdim=True)
        context, tokens = torch.cat([context, best], 1), torch.cat([tokens, best], 1)
    return tokens


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("length", "new"), [(1, 11), (4, 8), (1, 40), (12, 20), (30, 15)])
def test_greedy_equals_generation_without_a_cache(style: str, length: int, new: int) -> None:
    model, tokens = small_model(style), prompts(2, length)
    out = generate(model, tokens, max_new_tokens=new, greedy=True)
    assert out.shape == (2, length + new)
    assert torch.equal(out, uncached(model, tokens, new))


def test_a_model_of_one_position_generates() -> None:
    model = small_model(seq_len=1)
    out = generate(model, prompts(2, 3), max_new_tokens=4, greedy=True)
    context = out[:, 2:-1]
    with torch.no_grad():
        expected = [model(c)[:, -1].argmax(-1) for c in context.split(1, dim=1)]
    assert torch.equal(out[:, 3:], torch.stack(expected, dim=1))


def test_rows_of_a_batch_do_not_meet() -> None:
    model, tokens = small_model(), prompts(4, 5)
    together = generate(model, tokens, max_new_tokens=20, greedy=True)
    alone = [generate(model, row[None], max_new_tokens=20, greedy=True) for row in tokens]
    assert torch.equal(together, torch.cat(alone))


def test_a_seed_fixes_the_text() -> None:
    model, tokens = small_model(), prompts(2, 3)

    def text(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        out = generate(model, tokens, max_new_tokens=15, temperature=5.0, generator=generator)
        return out.tolist()

    assert text(1) == text(1) != text(2)


def test_the_mode_and_the_gradients_are_left_alone() -> None:
    model = small_model("gemma2").train()
    first = generate(model, prompts(1, 4), max_new_tokens=8, greedy=True)
    assert model.training  # and yet without dropout:
    assert torch.equal(first, generate(model, prompts(1, 4), max_new_tokens=8, greedy=True))
    model(first[:, -8:]).sum().backward()  # tokens can be trained on
    assert model.head_weight.grad is not None


def test_stop_token_ends_rows_and_fills_them_up() -> None:
    model, tokens = small_model(), prompts(3, 4)
    free = generate(model, tokens, max_new_tokens=30, greedy=True)[:, 4:]
    stop = int(free[0, 2])
    out = generate(model, tokens, max_new_tokens=30, greedy=True, stop_token=stop)[:, 4:]
    for row, unstopped in zip(out.tolist(), free.tolist(), strict=True):
        n = unstopped.index(stop) if stop in unstopped else len(row)
        assert row == (unstopped[:n] + [stop] * 30)[: len(row)]
    one = generate(model, tokens[:1], max_new_tokens=30, greedy=True, stop_token=stop)[0, 4:]
    assert one.tolist() == free[0, : free[0].tolist().index(stop) + 1].tolist()


@pytest.mark.parametrize("shape", [(3,), (2, 0)])
def test_prompts_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"tokens .*\(B, T\).*{re.escape(str(shape))}"):
        generate(small_model(), torch.zeros(shape, dtype=torch.long), max_new_tokens=1)


def test_the_stream_yields_what_generate_returns() -> None:
    model, tokens = small_model(), prompts(2, 3)
    pieces = list(stream(model, tokens, max_new_tokens=9, greedy=True))
    out = generate(model, tokens, max_new_tokens=9, greedy=True)
    assert torch.equal(torch.stack(pieces, dim=1), out[:, 3:])
    assert torch.is_grad_enabled()


# ---- load_model and the command ------------------------------------------------------------------


TINY: dict[str, Any] = {"vocab_size": 320, "dim": 32, "n_layers": 1, "n_heads": 2}


def write_run(folder: Path, shape: dict[str, Any], models: dict[int, Transformer]) -> Path:
    """Write a run with a checkpoint of each model by its step, of which the first is best."""
    data = {"path": "x", "seq_len": 32}
    toml = config_to_toml(config_from_dict({"model": shape, "data": data, "train": {"steps": 20}}))
    folder.mkdir()
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    writer = CheckpointWriter(folder / "checkpoints", keep_last=2, asynchronous=False)
    for step, model in models.items():
        state = {"model": model.state_dict()}
        writer.save(step, state, {"step": step}, toml, metric=float(step))
    return folder


def expected_model(step: int) -> Transformer:
    torch.manual_seed(step)
    return Transformer(ModelConfig(**TINY), seq_len=32)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 10 (best) and 20 (latest), of other weights each."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return write_run(folder, TINY, {step: expected_model(step) for step in (10, 20)})


@pytest.mark.parametrize(
    ("path", "which", "step"),
    [
        ("", "best", 10),
        ("", "latest", 20),
        ("checkpoints", "best", 10),
        ("checkpoints/step-00000020", "best", 20),
    ],
)
def test_load_model(run_dir: Path, path: str, which: str, step: int) -> None:
    state = torch.get_rng_state()
    model = load_model(run_dir / path, which=which)
    assert torch.equal(torch.get_rng_state(), state)
    expected = expected_model(step).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())
    assert not model.training


def test_load_model_takes_the_newest_where_none_is_best(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run/checkpoints/best").unlink()
    weight = load_model(tmp_path / "run").head_weight
    assert torch.equal(weight, expected_model(20).head_weight)


@pytest.mark.parametrize(("path", "which"), [("nowhere", "best"), ("", "first"), ("empty", "best")])
def test_load_model_says_what_is_wrong(tmp_path: Path, path: str, which: str) -> None:
    (tmp_path / "empty").mkdir()
    message = f"which .*'{which}'" if which == "first" else rf"{tmp_path}/{path}: .*name .*folder"
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / path, which=which)


def test_the_command_prints_prompt_and_text(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run_dir), "--prompt", "def main(", "--max-tokens", "40", "--device", "cpu"]
    assert main([*arguments, "--greedy"]) == 0
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("def main(").ids
    out = generate(
        load_model(run_dir), torch.tensor([ids]), max_new_tokens=40, greedy=True, stop_token=256
    )[0]
    text = tokenizer.decode(out.tolist())
    assert capsys.readouterr().out == text + "\n"
    main([*arguments, "--seed", "1"])
    first = capsys.readouterr().out
    main([*arguments, "--seed", "1"])
    assert capsys.readouterr().out == first
    main([*arguments, "--seed", "2"])
    assert capsys.readouterr().out != first


def test_the_command_prints_several_samples(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_dir), "--num-samples", "3", "--prompt", "ab", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    texts = [part.split("\n", 1)[1] for part in out.split("--- sample ")[1:]]
    assert len(set(texts)) == 3
    assert all(text.startswith("ab") for text in texts)


def test_an_empty_prompt_starts_a_document(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_dir), "--max-tokens", "9", "--greedy", "--device", "cpu"]) == 0
    out = generate(load_model(run_dir), torch.tensor([[256]]), max_new_tokens=9, greedy=True)
    assert capsys.readouterr().out == byte_tokenizer().decode(out[0].tolist()) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: .*folder"),
        (["RUN", "--top-p", "1.5"], r"top_p .*\b1\.5\b"),
        (["RUN", "--top-k", "0"], r"top_k .*\b0\b"),
        (["RUN", "--temperature", "-1"], "temperature .*-1"),
        (["RUN", "--max-tokens", "0"], r"--max-tokens .*\b0\b"),
        (["RUN", "--device", "cuda:99"], "cuda:99.*CUDA"),
        (["RUN", "--tokenizer", "missing.json"], r"missing\.json: .*tokenizer\.json"),
        (["RUN/checkpoints/step-00000030"], "step-00000030: .*folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([a.replace("RUN", str(run_dir)) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert re.search(message, captured.err)
    assert captured.err.count("\n") == 1


def test_the_command_in_a_process_that_stops_reading(run_dir: Path) -> None:
    """``… | head -c 5`` ends without a traceback."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    command = [sys.executable, "-m", "fasttrain.generate", str(run_dir), "--prompt", "def main("]
    with subprocess.Popen(
        [*command, "--max-tokens", "2000", "--temperature", "2", "--device", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5) == b"def m"
        process.stdout.close()
        errors = process.stderr.read()
    assert errors == b""
    assert process.returncode == 141


def test_a_prompt_that_is_not_utf_8_is_one_line(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([str(run_dir), "--prompt", "a\udcff"]) == 2
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="utf-8"))
    assert main([str(run_dir), "--interactive"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(line.startswith("error: ") and "UTF-8" in line for line in said)


# ---- texts: whole characters, stop strings, batches of prompts, interactive use ------------------

TEXTS = ["ab", "a much longer one", "cd", ""]
LETTERS: dict[str, Any] = {"vocab_size": 257, "dim": 32, "n_layers": 1, "n_heads": 2}


def letters() -> Transformer:
    torch.manual_seed(10)
    made = Transformer(ModelConfig(**LETTERS), seq_len=32).eval()
    with torch.no_grad():  # only letters, so that texts can be searched; far apart
        made.head_weight.normal_()
        made.head_weight[:97] = made.head_weight[123:] = 0.0
    return made


def complete(prompts: list[str], stop: tuple[str, ...] = (), **options: Any) -> list[str]:
    options = {"max_new_tokens": 24, "greedy": True, "stop": stop, **options}
    texts = [""] * len(prompts)
    tokenizer = byte_tokenizer()
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    for i, piece in stream_texts(letters(), tokenizer, encoded, **options):
        texts[i] += piece
    return texts


def streamed(prompt: str, *stop: str) -> str:
    return complete([prompt], stop)[0]


def test_characters_are_shown_when_they_are_whole() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("é✓ab").ids
    decoder = Decoder(tokenizer, tokenizer.encode("naï").ids)
    assert [decoder.push(i) for i in ids] == ["", "é", "", "", "✓", "a", "b"]
    decoder = Decoder(tokenizer, [])
    assert [decoder.push(0xE2), decoder.push(0x9C, last=True)] == ["", "\N{REPLACEMENT CHARACTER}"]


def test_a_stream_ends_before_a_stop_string_and_shows_no_part_of_it() -> None:
    whole = streamed("ab")
    assert len(whole) > 12
    stop = whole[6:9]
    at = whole.index(stop)
    assert streamed("ab", "@never", stop) == whole[:at]
    # What only looks like its beginning is shown in the end.
    assert streamed("ab", whole[-2:] + "@") == whole
    assert streamed("ab", whole[5:7] + "@") == whole


def test_a_batch_of_prompts_gives_what_each_gives_alone() -> None:
    texts = complete(TEXTS)
    assert texts == [streamed(prompt) for prompt in TEXTS]
    stop = texts[0][3:5]
    assert complete(TEXTS, (stop,)) == [text.split(stop)[0] for text in texts]
    drawn = {"max_new_tokens": 8, "greedy": False}
    generator = torch.Generator().manual_seed(3)
    first = complete(TEXTS, generator=generator, **drawn)
    generator.manual_seed(3)
    assert first == complete(TEXTS, generator=generator, **drawn)


def test_the_command_takes_several_prompts_stops_and_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", LETTERS, {1: letters()})
    command = [str(run), "--device", "cpu", "--greedy", "--max-tokens", "24"]
    assert main([*command, "--prompt", "ab", "--prompt", "cde"]) == 0
    texts = {prompt: streamed(prompt) for prompt in ("ab", "cde")}
    shown = "".join(
        f"--- sample {n}\n{prompt}{text}\n" for n, (prompt, text) in enumerate(texts.items(), 1)
    )
    assert capsys.readouterr().out == shown
    stop = texts["ab"][4:7]
    assert main([*command, "--prompt", "ab", "--stop", stop]) == 0
    assert capsys.readouterr().out == "ab" + texts["ab"].split(stop)[0] + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\ncde\n"))
    assert main([*command, "--interactive"]) == 0
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in texts.values())
    for wrong in (["--interactive", "--prompt", "a"], ["--stop", ""]):
        assert main([*command, *wrong]) == 2
        assert capsys.readouterr().err.startswith(f"error: {wrong[0]} ")
