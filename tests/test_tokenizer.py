"""Tokenizers that are tables: the fast way gives what their JSON gives."""

import pytest
from tokenizers import Tokenizer

from fasttrain.data.files import DataError
from fasttrain.data.tokenizer import Encoder, byte_tokenizer, char_tokenizer


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
