"""Tables give what their JSON gives; a BPE takes linear time, whatever the text."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from fasttrain.data import tokenizer as tokenizer_module
from fasttrain.data.tokenizer import (
    CODE_PATTERN,
    TEXT_PATTERN,
    Encoder,
    byte_tokenizer,
    char_tokenizer,
    encode,
    load_tokenizer,
    train_bpe,
)
from fasttrain.storage import DataError


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
        with pytest.raises(DataError, match="'Ж'"):
            encoder.encode(["Ж"])


ROOT = Path(__file__).parents[2]


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
def test_a_text_of_one_letter_takes_linear_time(letter: str, pattern: str) -> None:
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


def test_the_tokenizer_of_ordinary_text_stays_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [path.read_text("utf-8") for path in (ROOT / "README.md", *ROOT.glob("tests/**/*.py"))]
    texts += ["日" * 1023 + "。" + " " * 1024 + "\n" + "-" * 1000, "a" * 1024]
    parts = train_bpe(texts, 1000)
    monkeypatch.setattr(tokenizer_module, "MAX_WORD_CHARS", 100_000)
    assert parts.to_str() == train_bpe(texts, 1000).to_str()
    splits = [s for s in json.loads(parts.to_str())["pre_tokenizer"]["pretokenizers"]]
    assert [s["type"] for s in splits] == ["Split", "ByteLevel"]
    assert splits[0]["pattern"] == {"Regex": TEXT_PATTERN}


def saved(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(json.loads(byte_tokenizer().to_str()) | changes))
    return path


def test_padding_and_truncation_of_a_tokenizer_are_left_out(tmp_path: Path) -> None:
    padding = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    truncation = {"max_length": 1, "strategy": "LongestFirst", "stride": 5, "direction": "Right"}
    path = saved(tmp_path / "tokenizer.json", padding=padding, truncation=truncation)
    assert encode(load_tokenizer(path), "abc") == [97, 98, 99]


def replacing(*pairs: tuple[dict[str, str], str]) -> dict[str, Any]:
    steps = [{"type": "Replace", "pattern": old, "content": new} for old, new in pairs]
    return {"type": "Sequence", "normalizers": steps}


TEN = ({"String": "a"}, 10 * "a")
HOSTILE: dict[str, dict[str, Any]] = {
    "ten times ten times ten …": {"normalizer": replacing(*12 * [TEN])},
    "in twos": {"normalizer": replacing(*2 * [({"Regex": ""}, 10_000 * "b")])},
    "when it is decoded": {
        "decoder": {"type": "Sequence", "decoders": replacing(*12 * [TEN])["normalizers"]}
    },
    "a panic": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "a long token": {"model": {"type": "BPE", "vocab": {100_000 * "a": 0}, "merges": []}},
    "no field": {"model": {}},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_a_tokenizer_that_is_no_credible_one_is_refused(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    path = saved(tmp_path / "tokenizer.json", **changes)
    with pytest.raises(DataError, match=r"tokenizer\.json: .*(\btokenizers\b|\b10,000\b)"):
        load_tokenizer(path)


def test_replacements_that_are_usual_are_taken(tmp_path: Path) -> None:
    usual = [({"String": " "}, "▁"), ({"Regex": r"\s+"}, " "), ({"String": "ä"}, "ae")]
    pairs = [*usual, *(({"String": c}, 2 * c.lower()) for c in "ABCDEFGHIJKLMNOP")]
    path = saved(tmp_path / "tokenizer.json", normalizer=replacing(*pairs))
    assert encode(load_tokenizer(path), "B") == [98, 98]


@pytest.mark.parametrize(
    ("changes", "text", "reason"),
    [
        ({}, "a\udc80", "UTF-8"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "a", "chunk size"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}}, "b", "WordLevel"),
    ],
)
def test_a_text_that_cannot_be_encoded_is_refused(
    changes: dict[str, Any], text: str, reason: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(saved(tmp_path / "tokenizer.json", **changes))
    with pytest.raises(DataError, match=reason):
        encode(tokenizer, text)
