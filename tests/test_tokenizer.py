"""Tables give what their JSON gives; a BPE takes linear time, whatever the text."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from fasttrain.data import tokenizer as tokenizer_module
from fasttrain.data.files import DataError
from fasttrain.data.tokenizer import (
    CODE_PATTERN,
    TEXT_PATTERN,
    Encoder,
    byte_tokenizer,
    char_tokenizer,
    train_bpe,
)


@pytest.mark.parametrize("kind", ["bytes", "chars"])
def test_table_tokenizers_give_the_ids_of_their_json(kind: str) -> None:
    texts = ["the naïve “quotes” 日本語 🙂 \t tabs\n", "", "\x00\x7f\xa0­ÿĀ\r\n", "<|endoftext|>"]
    tokenizer = byte_tokenizer() if kind == "bytes" else char_tokenizer("".join(texts))
    encoder = Encoder(tokenizer, kind)
    loaded = Tokenizer.from_str(tokenizer.to_str())
    loaded.encode_special_tokens = True
    for text, ids in zip(texts, encoder.encode(texts), strict=True):
        assert ids.tolist() == loaded.encode(text, add_special_tokens=False).ids
        assert loaded.decode(ids.tolist(), skip_special_tokens=False) == text
    assert encoder.vocab_size == loaded.get_vocab_size()
    assert loaded.id_to_token(encoder.end_of_text) == "<|endoftext|>"
    if kind == "chars":
        with pytest.raises(DataError, match="character 'Ж'"):
            encoder.encode(["Ж"])


ROOT = Path(__file__).parents[1]


def seconds_of_processor(do: Callable[[int], object], n_letters: int) -> float:
    """The least of five times: what else the machine does counts little."""
    times = []
    for _ in range(5):
        begin = time.process_time()
        do(n_letters)
        times.append(time.process_time() - begin)
    return min(times)


@pytest.mark.parametrize("pattern", [TEXT_PATTERN, CODE_PATTERN])
@pytest.mark.parametrize("letter", ["a", "\0", " ", "日"])
def test_F18_a_text_of_one_letter_takes_linear_time(letter: str, pattern: str) -> None:
    def trained(n_letters: int) -> Tokenizer:
        return train_bpe([letter * n_letters, "abc " * 9], 1024, pattern=pattern)

    tokenizer = trained(1 << 14)
    # Learnt from in parts: no token is longer than a part, as it is when time is quadratic.
    longest = max(len(tokenizer.decode([n])) for n in range(tokenizer.get_vocab_size()))
    assert longest == tokenizer_module.MAX_WORD_CHARS
    ways: list[Callable[[int], object]] = [trained]
    for use_tiktoken in (True, False):
        encoder = Encoder(train_bpe(["abc"], 300, pattern=pattern), use_tiktoken=use_tiktoken)
        ways.append(lambda n, encoder=encoder: encoder.encode([letter * n]))
    for way in ways:  # linear: 4, quadratic: 16
        assert seconds_of_processor(way, 1 << 16) < 9 * seconds_of_processor(way, 1 << 14) + 0.01


def test_F18_the_tokenizer_of_ordinary_text_stays_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [path.read_text("utf-8") for path in (ROOT / "README.md", *ROOT.glob("tests/*.py"))]
    texts += ["日" * 1023 + "。" + " " * 1024 + "\n" + "-" * 1000, "a" * 1024]
    parts = train_bpe(texts, 1000)
    monkeypatch.setattr(tokenizer_module, "MAX_WORD_CHARS", 100_000)
    assert parts.to_str() == train_bpe(texts, 1000).to_str()
    splits = [s for s in json.loads(parts.to_str())["pre_tokenizer"]["pretokenizers"]]
    assert [s["type"] for s in splits] == ["Split", "ByteLevel"]
    assert splits[0]["pattern"] == {"Regex": TEXT_PATTERN}
