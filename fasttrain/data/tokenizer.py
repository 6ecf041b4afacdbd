"""Tokenizers for a dataset: byte-level BPE, bytes, characters, all stored as `tokenizers` JSON.

Whatever made a dataset, `tokenizers.Tokenizer.from_file` decodes it. Every tokenizer made here has
one special token, `<|endoftext|>`, which ends each document and never comes out of text: where the
text itself says `<|endoftext|>`, it is encoded as ordinary characters.
"""

import importlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unicodedata import category

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from fasttrain.config.keys import show
from fasttrain.storage import DataError

END_OF_TEXT = "<|endoftext|>"
# Of each call's text, what is encoded both ways: as much costs a tenth of the time that tiktoken
# takes for a call of 4 million characters.
SAMPLE_EVERY, SAMPLE_CHARS = 250, 4096
AT_ONCE = 4  # pieces of which the places of all tokens are held: a hundred bytes a token
# Of a tokenizer that is read: Gemma's has 33 MB, and the longest tokens some hundred characters.
MAX_BYTES, MAX_TOKEN_CHARS = 128 << 20, 10_000
MAX_LONGER = 1_000_000  # times as long as the text: ten replacements of a letter by ten make more
# Where byte-level BPE may not merge across. For text: words with one leading character, numbers in
# threes, punctuation with its line end, blank lines and indentation as runs: the scheme of GPT-4's
# tokenizer (cl100k_base) without its English contractions.
TEXT_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# For source code: names whole, with their underscores, and what ends a line together with the line
# end and the indentation of the next. With 4,096 tokens 3.74 bytes a token of Python against 3.47
# of the pattern for text.
CODE_PATTERN = r" ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+\n* *|\s+"
# To learn merges takes time quadratic in the longest word: 20 s for one of 128 Ki letters. Longer
# words than this are learnt from in parts. Ordinary ones are below: sentences of scripts without
# spaces, rules of dashes, and indentation have hundreds of characters at most.
MAX_WORD_CHARS = 1024


def _byte_level(vocab: dict[str, int] | None, *patterns: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab, [] if vocab is not None else None))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int, *, pattern: str = TEXT_PATTERN) -> Tokenizer:
    """Byte-level BPE, so that any text can be encoded and decoded without loss.

    No merge crosses a match of `pattern`. There are fewer than `vocab_size` tokens (special one and
    256 bytes included) where the text has not enough different pairs.

    Source:
        Sennrich, Haddow & Birch 2016 (BPE); Radford et al. 2019, GPT-2 (on bytes).
    """
    if vocab_size < 257:
        raise DataError(
            f"a byte-level BPE needs at least 257 tokens (256 bytes and {END_OF_TEXT}), got "
            f"{vocab_size}; use the tokenizer `bytes` for no merges at all"
        )
    tokenizer = _byte_level(None, pattern, rf"[\s\S]{{1,{MAX_WORD_CHARS}}}")
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT])
    trainer.initial_alphabet = BYTE_CHARACTERS
    trainer.show_progress = False
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = _byte_level(None, pattern).pre_tokenizer
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 is the end of text."""
    tokenizer = _byte_level({shown: byte for byte, shown in enumerate(BYTE_CHARACTERS)})
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def char_tokenizer(characters: Iterable[str]) -> Tokenizer:
    """One id for each character, in order of code point; the end of text comes last."""
    vocab = {character: number for number, character in enumerate(sorted(set(characters)))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """A `tokenizer.json`, without the padding and truncation that it may ask for."""
    if not path.is_file():
        raise DataError(f"{path}: there is no such tokenizer file; name an existing tokenizer.json")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path}: larger than {MAX_BYTES} bytes, which no tokenizer is")
    with _refusing(f"{path}: not a tokenizer in the format of `tokenizers`"):
        tokenizer = Tokenizer.from_buffer(path.read_bytes())
    tokenizer.no_padding()  # a text may be filled up to any length
    tokenizer.no_truncation()
    steps = [s.__getstate__() for s in (tokenizer.normalizer, tokenizer.decoder) if s is not None]
    longer = max((math.prod(_longer(json.loads(step))) for step in steps), default=1)
    longest = max(map(len, tokenizer.get_vocab()), default=0)
    if longer > MAX_LONGER or longest > MAX_TOKEN_CHARS:
        raise DataError(
            f"{path}: makes millions of characters of few, or has a token of more than "
            f"{MAX_TOKEN_CHARS:,}, which is not credible; use the tokenizer of another source"
        )
    return tokenizer


def _longer(step: Any) -> Iterator[float]:
    """How many times as long each replacement of a normalizer or decoder may make a text."""
    if isinstance(step, dict) and step.get("type") == "Replace":
        # An expression may match between any two characters.
        yield max(1, len(step["content"]) / max(1, len(step["pattern"].get("String", ""))))
    elif isinstance(step, dict | list):
        for part in step.values() if isinstance(step, dict) else step:
            yield from _longer(part)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Names what `tokenizers` refuses: it raises plain Exception, or a panic, which is none."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{what} ({error})") from None


def encode(tokenizer: Tokenizer, text: str, *, special_tokens: bool = False) -> list[int]:
    """The ids of a text, on request with the special tokens that the tokenizer itself adds."""
    if not text.isascii() and text != text.encode(errors="replace").decode():
        raise DataError(f"the text {show(text)} is not UTF-8; give it in UTF-8")
    with _refusing(f"the tokenizer cannot encode {show(text)}"):
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special_tokens).ids
    return ids


def end_of_text_id(tokenizer: Tokenizer) -> int | None:
    """The id that ends documents, None if the tokenizer has none of the usual names for it."""
    names = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|endofdoc|>")
    found = (tokenizer.token_to_id(name) for name in names)
    return next((number for number in found if number is not None), None)


# The ByteLevel step writes byte b as one printable character: itself where it is printable Latin-1,
# and U+0100, U+0101 … for the others in order.
_ALPHABET = pre_tokenizers.ByteLevel.alphabet()
_OTHERS = iter(sorted(c for c in _ALPHABET if c > "\xff"))
BYTE_CHARACTERS = [c if (c := chr(b)) in _ALPHABET else next(_OTHERS) for b in range(256)]
_BYTE_OF = {ord(character): byte for byte, character in enumerate(BYTE_CHARACTERS)}
# What ByteLevel with use_regex = true splits by: the words of GPT-2.
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_RESERVED = "<|reserved|>"
# These versions take time quadratic in the longest word: 5 s for one of 128 Ki letters.
_QUADRATIC = tuple(f"0.{minor}." for minor in range(13))


class FastBpe:
    """Byte-level BPE through tiktoken: the ids that `tokenizers` gives, several times as fast.

    `tokenizers` lists merges, each of one pair; tiktoken merges any two neighbours whose
    concatenation it knows, in order of its rank. With rank = 256 + place in the list of merges they
    agree on every word if

    1. each merge's parts are single bytes or products of merges before it,
    2. no two merges have the same product, and
    3. every product, given alone as a word, comes out as that one token.

    For suppose tiktoken joins the neighbours x and y to s, of rank r, where the list has another
    pair (u, v) for s. What stands between two borders when all merges below r are done depends on
    nothing beyond the borders, so s given alone would be [x, y] then, never [u, v], and by 2 never
    s: against 3. All three are verified here; what remains is the regular expression that finds the
    words, which two libraries execute, each with the Unicode tables of its time. Text with
    characters that are newer than this Python's table is therefore left to `tokenizers`, and
    `Encoder` compares the ids on a sample of what it encodes.

    A tokenizer for which this fails raises a DataError that completes "because …".
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            tiktoken, now = importlib.import_module("tiktoken"), version("tiktoken")
        except ImportError:
            raise DataError("tiktoken is not installed (pip install tiktoken)") from None
        if now.startswith(_QUADRATIC):
            raise DataError(f"tiktoken {now} is slow (pip install 'tiktoken>=0.13')")
        state = json.loads(tokenizer.to_str())
        model, pattern = state["model"], _pattern(state)
        plain = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
        if model["type"] != "BPE" or any(model.get(key) for key in plain) or model["byte_fallback"]:
            raise DataError("its model is not a plain byte-level BPE")
        # The tokens in order of rank, and the three conditions.
        vocab: dict[str, int] = model["vocab"]
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        alone, known = models.BPE(vocab, merges), dict.fromkeys(BYTE_CHARACTERS)
        agree = known.keys() <= vocab.keys()
        for left, right in merges:
            made_once = left in known and right in known and left + right not in known
            agree = agree and made_once and len(alone.tokenize(left + right)) == 1
            known[left + right] = None
        if not agree or (model.get("ignore_merges") and vocab.keys() - known.keys()):
            raise DataError("its merges could give other ids there")
        words = [token.translate(_BYTE_OF).encode("latin-1") for token in known]
        self._ids = np.array([vocab[token] for token in known], np.uint32)
        self._n_bytes = np.array([len(word) for word in words], np.uint32)
        try:
            # Without any special token its search for them stops at every character.
            ranks = {word: rank for rank, word in enumerate(words)}
            tokens = {"mergeable_ranks": ranks, "special_tokens": {_RESERVED: len(words)}}
            self._tiktoken = tiktoken.Encoding("fasttrain", pat_str=pattern, **tokens)
        except Exception as error:  # a ValueError of its own or of the regular expression's
            raise DataError(f"tiktoken does not take it ({error})") from None

    def encode(self, text: str, before: str = "", after: str = "") -> NDArray[np.uint32] | None:
        """The ids of a text, or None where they would be uncertain.

        Between `before` and `after` they are those of the tokens that begin in it.
        """
        low = len(before.encode())
        high = low + len(text.encode()) if after else math.inf
        text = before + text + after
        # Newer than this Python's Unicode, or beyond the last ideographs, where no words are.
        if not text.isascii() and any(c > "\U000323af" or category(c) == "Cn" for c in set(text)):
            return None
        try:
            ranks: NDArray[np.uint32] = self._tiktoken.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # the regular expression was given up
            return None
        # A pattern that does not match everything: tiktoken leaves the rest out.
        if int(self._n_bytes[ranks].sum()) != len(text.encode()):
            return None
        if before or after:
            begins = np.cumsum(self._n_bytes[ranks]) - self._n_bytes[ranks]
            ranks = ranks[(begins >= low) & (begins < high)]
        return self._ids.take(ranks)


def _pattern(state: dict[str, Any]) -> str:
    """The regular expression of a tokenizer's words, if its words are all that shapes the ids."""
    step = state["pre_tokenizer"] or {"type": "none"}
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    words_alone = state["normalizer"] is None and all(t["special"] for t in state["added_tokens"])
    match steps if words_alone else []:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return _GPT2_PATTERN
        case [
            {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": regex}},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return str(regex)
    raise DataError("it normalizes or splits the text in a way of its own")


def _is_between_words(left: str, right: str) -> bool:
    """Return whether no word spans the place between two texts."""
    at_line = left.endswith("\n") and not right[:1].isspace()
    at_space = right[:1] == " " and not (left[-1:].isspace() or right[1:2].isspace())
    return not left or not right or at_line or at_space


class OtherIdsError(Exception):
    """tiktoken gave other ids than the tokenizer itself; the message shows where."""


class Encoder:
    """Turns texts into ids, as the tokenizer's JSON does, and faster where that can be proven.

    Special tokens written out in a text are encoded as ordinary text. `kind` is "bytes" or "chars"
    for a tokenizer that `byte_tokenizer` or `char_tokenizer` made, else anything.
    """

    def __init__(
        self, tokenizer: Tokenizer, kind: str = "bpe", *, use_tiktoken: bool = True
    ) -> None:
        tokenizer.encode_special_tokens = True
        self.tokenizer, self.kind = tokenizer, kind
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        if not vocab:
            raise DataError("the tokenizer has no tokens; train one: --tokenizer bpe:4096")
        self.vocab_size = 1 + max(vocab.values())
        self.end_of_text = end_of_text_id(tokenizer)
        self._fast: FastBpe | None = None
        self.not_fast = ""  # why a BPE is encoded by `tokenizers`
        self._by_words = False  # what stands around a word does not change its tokens
        self.losses = Losses(tokenizer)
        if kind == "chars":
            self.losses.what = ""  # refused
            ids = {ord(token): number for token, number in vocab.items() if len(token) == 1}
            self._id_of: NDArray[np.int32] = np.full(0x110000, -1, np.int32)  # of each code point
            self._id_of[list(ids)] = list(ids.values())
        elif kind != "bytes":
            with suppress(DataError):
                _pattern(json.loads(tokenizer.to_str()))
                self._by_words = True
        if kind not in ("bytes", "chars") and use_tiktoken:
            try:
                self._fast = FastBpe(tokenizer)
            except DataError as reason:
                self.not_fast = str(reason)

    def encode(
        self, texts: Sequence[str], around: Sequence[tuple[str, str]] = ()
    ) -> list[NDArray[np.unsignedinteger[Any]]]:
        """The ids of each text, without any end of text.

        Where a text is a piece of a longer one, `around` has the end of what comes before it and
        the beginning of what comes after: its ids are then those that it has in the whole, of the
        tokens that begin in it.
        """
        if self.kind == "bytes":
            return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]
        if self.kind == "chars":
            return [self._ids_of_characters(text) for text in texts]
        sides = list(around) or [("", "")] * len(texts)
        if self._by_words:  # no token spans a place between two words
            sides = [
                (
                    "" if _is_between_words(before, text) else before,
                    "" if _is_between_words(text, after) else after,
                )
                for text, (before, after) in zip(texts, sides, strict=True)
            ]
        if self._fast is not None:
            self._compare(texts)
        results: list[NDArray[np.unsignedinteger[Any]] | None] = [None] * len(texts)
        if self._fast is not None:
            for n, (text, (before, after)) in enumerate(zip(texts, sides, strict=True)):
                results[n] = self._fast.encode(text, before, after)
        alone = [n for n, ids in enumerate(results) if ids is None and not any(sides[n])]
        for n, ids in zip(alone, self._encode_exactly([texts[n] for n in alone]), strict=True):
            results[n] = ids
        within = [n for n, ids in enumerate(results) if ids is None]
        for start in range(0, len(within), AT_ONCE):
            some = within[start : start + AT_ONCE]
            parts = [(sides[n][0], texts[n], sides[n][1]) for n in some]
            for n, ids in zip(some, self._encode_within(parts), strict=True):
                results[n] = ids
        return [ids for ids in results if ids is not None]

    def _encode_within(self, parts: Sequence[tuple[str, str, str]]) -> list[NDArray[np.uint32]]:
        """The ids of the tokens that begin in each middle text, between the two beside it."""
        with _refusing("the tokenizer cannot encode this text"):
            wholes = ["".join(part) for part in parts]
            encoded = self.tokenizer.encode_batch(wholes, add_special_tokens=False)
        results = []
        for (before, text, after), whole in zip(parts, encoded, strict=True):
            begins = np.array([begin for begin, _ in whole.offsets], dtype=np.int64)
            is_mine = begins >= len(before)
            if after:
                is_mine &= begins < len(before) + len(text)
            results.append(np.array(whole.ids, dtype=np.uint32)[is_mine])
        return results

    def _encode_exactly(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger[Any]]]:
        with _refusing("the tokenizer cannot encode this text"):
            encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=np.uint32) for one in encoded]

    def _compare(self, texts: Sequence[str]) -> None:
        """Encodes one stretch of the text both ways; which, depends on the texts alone."""
        text = "".join(texts)
        n_chars = max(SAMPLE_CHARS, len(text) // SAMPLE_EVERY)
        start = 7919 * len(text) % max(1, len(text) - n_chars)
        part = text[start : start + n_chars]
        fast = self._fast.encode(part) if self._fast else None
        exact = self._encode_exactly([part])[0]
        if fast is not None and not np.array_equal(fast, exact):
            n = min(fast.size, exact.size)
            at = int(np.flatnonzero(np.append(fast[:n] != exact[:n], True))[0])
            before = self.tokenizer.decode(exact[max(0, at - 5) : at].tolist())
            raise OtherIdsError(
                f"after {before!r} by tiktoken {fast[at : at + 5].tolist()}, "
                f"by the tokenizer itself {exact[at : at + 5].tolist()}"
            )

    def _ids_of_characters(self, text: str) -> NDArray[np.uint32]:
        ids = self._id_of.take(np.frombuffer(text.encode("utf-32-le"), dtype="<u4"))
        if (unknown := ids < 0).any():
            character = text[int(unknown.argmax())]
            raise DataError(f"the character {character!r} is not among those of the tokenizer")
        return ids.astype(np.uint32)


class Losses:
    """Finds what encoding a text with a tokenizer loses.

    What normalizer and pre-tokenizer remove, as accents or spaces, is the tokenizer's intention and
    not counted: only what its model has no token for.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        state = json.loads(tokenizer.to_str())
        model: dict[str, Any] = state["model"]
        vocab: Any = model["vocab"]
        # What is lost and what becomes of it, in words; empty where nothing can be lost.
        self.what, self._unknown_id, self._left_out = "", model.get("unk_id"), False
        if (unknown := model.get("unk_token")) is not None:
            self._unknown_id = tokenizer.token_to_id(unknown)
        if self._unknown_id is not None:
            name = tokenizer.id_to_token(self._unknown_id)
            self.what = f"places that the tokenizer has no token for (encoded as {name})"
        elif model["type"] == "BPE" and not model["byte_fallback"]:
            byte_level = '"ByteLevel"' in json.dumps([state["pre_tokenizer"], state["normalizer"]])
            if byte_level and vocab.keys() >= set(BYTE_CHARACTERS):
                return
            self.what = "characters that the tokenizer has no token for (left out)"
            # A tokenizer that has a token for them tells where they are.
            self._left_out = True
            self._unknown_id = 1 + max(tokenizer.get_vocab().values())
            vocab[_RESERVED], model["unk_token"] = self._unknown_id, _RESERVED
            self._tokenizer = Tokenizer.from_str(json.dumps(state))
            self._tokenizer.encode_special_tokens = True

    def count(self, text: str, ids: NDArray[np.unsignedinteger[Any]]) -> int:
        """How much of a text is lost in its `ids`."""
        if not self.what:
            return 0
        return len(self.places(text)) if self._left_out else int((ids == self._unknown_id).sum())

    def places(self, text: str) -> list[tuple[int, int]]:
        """Where in a text something is lost, in order: offsets of its begin and end."""
        found = self._tokenizer.encode(text, add_special_tokens=False)
        spans = list(zip(found.ids, found.offsets, strict=True))
        # Of a character that has one, a pre-tokenizer may have put a space in front.
        kept = {at for token, span in spans if token != self._unknown_id for at in range(*span)}
        lost = {span for token, span in spans if token == self._unknown_id}
        return sorted((begin, end) for begin, end in lost if begin not in kept)
