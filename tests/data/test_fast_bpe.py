"""tiktoken gives the ids of `tokenizers`, or is not used."""

import json
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from fasttrain.data import tokenizer as tokenizer_module
from fasttrain.data.tokenizer import (
    BYTE_CHARACTERS,
    CODE_PATTERN,
    TEXT_PATTERN,
    Encoder,
    FastBpe,
    OtherIdsError,
    byte_tokenizer,
    char_tokenizer,
    train_bpe,
)
from fasttrain.storage import DataError

pytest.importorskip("tiktoken", reason="needs the optional package tiktoken")

TEXT = (
    "The naïve model's words, don't they're 1234567 tokens;\n\n\n    def f(x_1, y):\r\n\treturn x\n"
    "“quotes” – 日本語のテキスト 🙂🙃 ß İ ﬁ \u00a0\u2003 \u200b e\u0301 <|endoftext|> aaaa   \n"
) * 4
# Llama 3's, with the case-insensitive group that ours do without.
LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def gpt2_like() -> Tokenizer:
    """The pre-tokenizer of GPT-2's tokenizer.json, its merges learnt here."""
    tokenizer = train_bpe([TEXT], 400, pattern=LLAMA_PATTERN)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return tokenizer


TOKENIZERS: dict[str, Tokenizer] = {
    "text": train_bpe([TEXT], 450, pattern=TEXT_PATTERN),
    "code": train_bpe([TEXT], 450, pattern=CODE_PATTERN),
    "llama": train_bpe([TEXT], 450, pattern=LLAMA_PATTERN),
    "gpt2": gpt2_like(),
}
for _tokenizer in TOKENIZERS.values():
    _tokenizer.encode_special_tokens = True
FAST = {name: FastBpe(tokenizer) for name, tokenizer in TOKENIZERS.items()}

SPACES = (
    " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u180e\u2000\u2009\u2028\u2029\u202f\u205f\u3000\ufeff"
)
nasty = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.text(alphabet=SPACES, min_size=1, max_size=6),
        st.sampled_from(TEXT.split(" ")),
        st.sampled_from(
            ["<|endoftext|>", "<|reserved|>", "'LL", "'ſ", "ﬁ", "\U0001f468\u200d", "١٢٣"]
        ),
    ),
    max_size=20,
).map("".join)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@given(text=nasty)
def test_any_text_gives_the_ids_of_the_tokenizer(name: str, text: str) -> None:
    expected = TOKENIZERS[name].encode(text, add_special_tokens=False).ids
    ids = FAST[name].encode(text)
    assert ids is None or ids.tolist() == expected
    if all(ord(c) < 0x323B0 and unicodedata.category(c) != "Cn" for c in text):
        assert ids is not None
    assert Encoder(TOKENIZERS[name]).encode([text])[0].tolist() == expected


def boundary_tokenizer(pattern: str) -> Tokenizer:
    """Merges across every place where a word may end: its ids show where words do end."""
    marks = [ord(mark) for mark in " ab1.\n_"]
    ends, begins = [*marks, *range(0x80, 0xC0)], [*marks, *range(0xC2, 0xF5)]
    merges = [(BYTE_CHARACTERS[e], BYTE_CHARACTERS[b]) for e in ends for b in begins]
    vocab = {token: number for number, token in enumerate(BYTE_CHARACTERS)}
    vocab |= {left + right: 256 + number for number, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


@pytest.mark.parametrize("pattern", [TEXT_PATTERN, CODE_PATTERN])
def test_both_libraries_class_every_known_character_alike(pattern: str) -> None:
    tokenizer = boundary_tokenizer(pattern)
    fast = FastBpe(tokenizer)
    alike = range(0x3400, 0xD800)  # ideographs and syllables: every 50th is enough
    points = [*range(0x3400), *alike[::50], *range(0xE000, 0x20000)]
    known = [chr(c) for c in points if unicodedata.category(chr(c)) not in ("Cn", "Co", "Cs")]
    known = [c for n, c in enumerate(known) if ord(c) < 0x3400 or n % 10 == 0]
    texts = [f"a{c}b{c}{c} {c}1{c}\n{c}._{c}\n\n{c} " for c in known]
    for start in range(0, len(texts), 500):
        text = "".join(texts[start : start + 500])
        ids = fast.encode(text)
        assert ids is not None
        assert ids.tolist() == tokenizer.encode(text).ids, f"near {known[start]!r}"


def test_text_newer_than_the_unicode_here_is_left_to_the_tokenizer() -> None:
    unknown = next(chr(c) for c in range(0x10000) if unicodedata.category(chr(c)) == "Cn")
    for character in (unknown, "\U000e1000"):
        text = f"a{character} b"
        assert FAST["text"].encode(text) is None
        expected = TOKENIZERS["text"].encode(text).ids
        assert Encoder(TOKENIZERS["text"]).encode([text])[0].tolist() == expected


def changed(change: Callable[[dict[str, Any]], object]) -> Tokenizer:
    state = json.loads(TOKENIZERS["text"].to_str())
    change(state)
    return Tokenizer.from_str(json.dumps(state))


def swap_merges(state: dict[str, Any]) -> None:
    """A token is used before it is made."""
    merges = state["model"]["merges"]
    at = next(n for n, (left, right) in enumerate(merges) if len(left) > 1)
    merges.insert(0, merges.pop(at))


def second_way(state: dict[str, Any]) -> None:
    """A product that another merge has too."""
    merges = state["model"]["merges"]
    left, right = next(m for m in merges if len(m[0]) > 1)
    state["model"]["merges"].append([left[0], left[1:] + right])
    state["model"]["vocab"].setdefault(left[1:] + right, len(state["model"]["vocab"]))


def unreachable(state: dict[str, Any]) -> None:
    """The product of a merge whose parts have always been merged otherwise before."""
    merges, vocab = state["model"]["merges"], state["model"]["vocab"]
    left, right = merges[0]
    vocab[right + left + right] = len(vocab)
    vocab[right + left] = len(vocab)
    merges += [[right, left], [right + left, right]]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (byte_tokenizer, "splits"),
        (lambda: char_tokenizer("abc"), "splits"),
        (lambda: changed(lambda s: s.update(normalizer={"type": "NFC"})), "splits"),
        (lambda: changed(lambda s: s["added_tokens"][0].update(special=False)), "splits"),
        (lambda: changed(lambda s: s["model"].update(byte_fallback=True)), "byte-level BPE"),
        (lambda: changed(lambda s: s["model"].update(dropout=0.1)), "byte-level BPE"),
        (lambda: changed(lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(invert=True)),
         "splits"),
        (lambda: changed(swap_merges), "merges"),
        (lambda: changed(second_way), "merges"),
        (lambda: changed(unreachable), "merges"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_could_differ_is_refused(
    make: Callable[[], Tokenizer], reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        FastBpe(make())


def test_without_tiktoken_the_ids_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Encoder(TOKENIZERS["text"]).encode([TEXT])[0].tolist()

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("fasttrain.data.tokenizer.importlib.import_module", missing)
    encoder = Encoder(TOKENIZERS["text"])
    assert "pip install tiktoken" in encoder.not_fast
    assert encoder.encode([TEXT])[0].tolist() == expected


def test_a_tiktoken_of_quadratic_time_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for old, used in (("0.12.0", False), ("0.13.0", True), ("0.130.1", True), ("1.0", True)):
        monkeypatch.setattr("fasttrain.data.tokenizer.version", lambda name, old=old: old)
        why = Encoder(TOKENIZERS["text"]).not_fast
        assert (why == "") == used
        assert used or f"tiktoken {old} " in why
        assert used or "pip install 'tiktoken>=0.13'" in why


def test_other_ids_are_found_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    # As if the regular expression meant something else to tiktoken.
    tiktoken = pytest.importorskip("tiktoken", reason="needs the extra data")
    encoding = tiktoken.Encoding

    def meaning(pattern: str) -> None:
        monkeypatch.setattr(
            tiktoken,
            "Encoding",
            lambda name, **options: encoding(name, **options | {"pat_str": pattern}),
        )

    meaning(r"\s+|\S+")
    encoder = Encoder(TOKENIZERS["text"])
    assert not encoder.not_fast
    with pytest.raises(OtherIdsError, match=r"tiktoken \[.*\].*\[.*\]"):
        encoder.encode([TEXT])
    meaning(r"\S+")  # leaves some out
    assert FastBpe(TOKENIZERS["text"]).encode("a b") is None


def test_the_sample_moves_over_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "SAMPLE_CHARS", 10)
    compared: list[str] = []
    encoder = Encoder(TOKENIZERS["text"])
    exactly = encoder._encode_exactly

    def spy(texts: Any) -> Any:
        compared.extend(texts)
        return exactly(texts)

    monkeypatch.setattr(encoder, "_encode_exactly", spy)
    for count in range(30):
        encoder.encode([TEXT + "x" * count])
    assert len(compared) == 30
    assert len({TEXT.find(part) for part in compared}) > 20
    assert all(len(part) == 10 for part in compared)
