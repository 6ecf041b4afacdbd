"""What a tokenizer has no token for: counted and reported, never silently left out."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from fasttrain.data.tokenizer import Encoder, Losses, byte_tokenizer, char_tokenizer, train_bpe
from fasttrain.prepare import build, main, prepare, writer
from fasttrain.storage import DataError

LETTERS = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz \n.")}


def letters(**options: object) -> Tokenizer:
    """Of small letters, which has no bytes."""
    return Tokenizer(models.BPE(LETTERS | {"<unk>": 29, "th": 30}, [("t", "h")], **options))


def run(folder: Path, tokenizer: Tokenizer, texts: list[str], **options: object) -> list[str]:
    tokenizer.save(str(folder / "t.json"))
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "in.jsonl").write_text("".join(lines))
    notes: list[str] = []
    prepare(
        folder / "out",
        [str(folder / "in.jsonl")],
        tokenizer=str(folder / "t.json"),
        val_fraction=0,
        note=notes.append,
        **options,  # type: ignore[arg-type]
    )
    return notes


def only_problem(folder: Path, notes: list[str], count: int) -> str:
    """Return what alone was wrong with a text, so often: it is recorded as it was told."""
    problems = json.loads((folder / "dataset.json").read_text())["source"]["problems"]
    assert list(problems.values()) == [count]
    (reason,) = problems
    assert f"{reason}: {count}" in notes
    return str(reason)


TEXTS = ["the first", "the Second, 日本 ", "日", "the end"]


@pytest.mark.parametrize(
    ("unknown", "expected"),
    [
        (None, r"^characters\b.*\btoken\b"),
        ("<unk>", r"\btoken\b.*<unk>"),
    ],
)
def test_what_has_no_token_is_counted_and_reported(
    tmp_path: Path, unknown: str | None, expected: str
) -> None:
    notes = run(tmp_path, letters(unk_token=unknown), TEXTS)
    assert re.search(expected, only_problem(tmp_path / "out", notes, 5))


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_strict_ends_at_the_first_of_it_with_file_and_place(
    tmp_path: Path, unknown: str | None
) -> None:
    match = r"in\.jsonl:2: .*'S'.*'the '.*--strict"
    with pytest.raises(DataError, match=match):
        run(tmp_path, letters(unk_token=unknown), TEXTS, strict=True)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_counts_no_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "BATCH_CHARS", 1)
    monkeypatch.setattr(build, "CHECKPOINT_S", 0.0)
    write, n_written = writer.ShardWriter.write, 0

    def interrupted(*arguments: object) -> None:
        nonlocal n_written
        n_written += 1
        if n_written == 6:  # train and val of the third batch
            raise KeyboardInterrupt
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(writer.ShardWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, letters(), TEXTS)
    notes: list[str] = []
    options = {"tokenizer": str(tmp_path / "t.json"), "val_fraction": 0, "resume": True}
    prepare(tmp_path / "out", [str(tmp_path / "in.jsonl")], note=notes.append, **options)
    assert re.search(r"^characters\b.*\btoken\b", only_problem(tmp_path / "out", notes, 5))


def metaspace() -> Tokenizer:
    tokenizer = letters()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def without_accents() -> Tokenizer:
    tokenizer = letters()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    return tokenizer


def some_bytes() -> Tokenizer:
    tokenizer = letters()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def with_affixes() -> Tokenizer:
    vocab = {"a": 0, "##b": 1, "c</w>": 2, "##d</w>": 3}
    return Tokenizer(
        models.BPE(vocab, [], continuing_subword_prefix="##", end_of_word_suffix="</w>")
    )


@pytest.mark.parametrize(
    ("tokenizer", "text", "lost"),
    [
        (byte_tokenizer(), "日 é", 0),
        (train_bpe(["some text"], 300), "日 é", 0),
        (char_tokenizer("abé"), "abé", 0),
        (letters(), "abc. the\n", 0),
        (letters(), "aBc\t", 2),
        (metaspace(), "the ab", 1),  # what it writes for the space; the one in front is no one's
        (metaspace(), "the éé▁", 4),
        (without_accents(), "The é", 0),  # removed by intention
        (without_accents(), "The é 1", 1),
        (some_bytes(), "the ab", 1),
        (some_bytes(), "é", 1),
        (with_affixes(), "abd", 0),
        (with_affixes(), "abcd", 1),  # it has one for c at the beginning of a word
        (with_affixes(), "abx", 1),
    ],
)
def test_only_what_the_model_has_no_token_for_counts(
    tokenizer: Tokenizer, text: str, lost: int
) -> None:
    encoder = Encoder(tokenizer)
    assert encoder.losses.count(text, encoder.encode([text])[0]) == lost


def test_losses_are_found_in_the_text() -> None:
    assert Losses(letters()).places("ab\nAcB") == [(3, 4), (5, 6)]
    assert Losses(letters(unk_token="<unk>")).places("ab\nAcB") == [(3, 4), (5, 6)]
    tokenizer = letters()
    tokenizer.normalizer = normalizers.Replace("x", "%")
    assert Losses(tokenizer).places("abx") == [(2, 3)]  # what the text has in its place


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tokenizer_that_gives_up_is_an_error_that_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    workers: int,
) -> None:
    monkeypatch.setattr(build, "WORKER_BYTES", 1)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="?")).save(str(tmp_path / "t.json"))
    (tmp_path / "in.txt").write_text("b" * 100)
    arguments = [str(tmp_path / "out"), "--input", str(tmp_path / "in.txt")]
    status = main([*arguments, "--tokenizer", str(tmp_path / "t.json"), "--workers", str(workers)])
    assert status == 2
    assert "(WordLevel error: Missing" in capsys.readouterr().err
