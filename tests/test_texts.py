"""Text from a model: whole characters, stop strings, batches of prompts, interactive use."""

import io
from pathlib import Path

import pytest
import torch

from fasttrain.checkpoint import CheckpointWriter
from fasttrain.config import config_from_dict, config_to_toml
from fasttrain.data.tokenizer import byte_tokenizer
from fasttrain.generate import Decoder, complete, main, stream_text
from fasttrain.model.transformer import Transformer

PROMPTS = ["ab", "a much longer one", "cd", ""]


def model() -> Transformer:
    torch.manual_seed(10)
    shape = {"vocab_size": 257, "dim": 32, "n_layers": 1, "n_heads": 2}
    config = config_from_dict({"model": shape, "train": {"steps": 1}, "data": {"path": "x"}})
    made = Transformer(config.model, seq_len=32).eval()
    with torch.no_grad():  # only letters, so that texts can be searched; far apart
        made.head_weight.normal_()
        made.head_weight[:97] = made.head_weight[123:] = 0.0
    return made


def streamed(prompt: str, *stop: str) -> list[str]:
    pieces = stream_text(
        model(), byte_tokenizer(), prompt, max_new_tokens=24, stop=stop, greedy=True
    )
    return list(pieces)


def test_characters_are_shown_when_they_are_whole() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("é✓ab").ids
    decoder = Decoder(tokenizer, tokenizer.encode("naï").ids)
    assert [decoder.push(i) for i in ids] == ["", "é", "", "", "✓", "a", "b"]
    decoder = Decoder(tokenizer, [])
    assert [decoder.push(0xE2), decoder.push(0x9C, last=True)] == ["", "\N{REPLACEMENT CHARACTER}"]


def test_a_stream_ends_before_a_stop_string_and_shows_no_part_of_it() -> None:
    whole = "".join(streamed("ab"))
    assert len(whole) > 12
    stop = whole[6:9]
    at = whole.index(stop)
    assert "".join(streamed("ab", "@never", stop)) == whole[:at]
    # What only looks like its beginning is shown in the end.
    assert "".join(streamed("ab", whole[-2:] + "@")) == whole
    assert "".join(streamed("ab", whole[5:7] + "@")) == whole


def test_a_batch_of_prompts_gives_what_each_gives_alone() -> None:
    texts = complete(model(), byte_tokenizer(), PROMPTS, max_new_tokens=24, greedy=True)
    assert texts == ["".join(streamed(prompt)) for prompt in PROMPTS]
    stop = texts[0][3:5]
    stopped = complete(
        model(), byte_tokenizer(), PROMPTS, max_new_tokens=24, stop=[stop], greedy=True
    )
    assert stopped == [text.split(stop)[0] for text in texts]
    generator = torch.Generator().manual_seed(3)
    first = complete(model(), byte_tokenizer(), PROMPTS, max_new_tokens=8, generator=generator)
    generator.manual_seed(3)
    again = complete(model(), byte_tokenizer(), PROMPTS, max_new_tokens=8, generator=generator)
    assert first == again


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    shape = {"vocab_size": 257, "dim": 32, "n_layers": 1, "n_heads": 2}
    config = config_from_dict(
        {"model": shape, "train": {"steps": 1}, "data": {"path": "x", "seq_len": 32}}
    )
    (tmp_path / "run").mkdir()
    byte_tokenizer().save(str(tmp_path / "run/tokenizer.json"))
    writer = CheckpointWriter(tmp_path / "run/checkpoints", keep_last=1, asynchronous=False)
    writer.save(1, {"model": model().state_dict()}, {"step": 1}, config_to_toml(config))
    return tmp_path / "run"


def test_the_command_takes_several_prompts_stops_and_lines(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [str(run_dir), "--device", "cpu", "--greedy", "--max-tokens", "24"]
    assert main([*command, "--prompt", "ab", "--prompt", "cde"]) == 0
    texts = {prompt: "".join(streamed(prompt)) for prompt in ("ab", "cde")}
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
        assert "error: --" in capsys.readouterr().err
