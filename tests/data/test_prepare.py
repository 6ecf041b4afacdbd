"""From text to a dataset: nothing lost, nothing in both splits, nothing half written."""

import gzip
import io
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from fasttrain.data.format import open_dataset
from fasttrain.data.tokenizer import Encoder, OtherIdsError, char_tokenizer, train_bpe
from fasttrain.prepare import build, inputs, main, prepare, sources
from fasttrain.prepare.inputs import find_files, local_file
from fasttrain.prepare.sources import Source, Splitter
from fasttrain.storage import DataError

WORDS = ["the", "model", "reads", "", "line", "of", "words,", "12", "345", "tokens;", "naïve"]
WORDS += ["“quotes”", "日本語", "🙂", "\t", "tabs"]


def make_texts(count: int, words: int = 60, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [
        " ".join(rng.choices(WORDS, k=rng.randint(1, words))) + f"\n  line {number}\n"
        for number in range(count)
    ]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_jsonl(path: Path, texts: list[str], **extra: object) -> Path:
    path.write_text("".join(json.dumps({"text": text} | extra) + "\n" for text in texts))
    return path


def run(out: Path, *inputs: Path | str, **options: object) -> list[str]:
    notes: list[str] = []
    prepare(out, [str(name) for name in inputs], note=notes.append, **options)  # type: ignore[arg-type]
    return notes


def problems(folder: Path, notes: list[str], *patterns: str) -> list[int]:
    """Return how often each problem was met, by patterns; all are told as they are recorded."""
    found = json.loads((folder / "dataset.json").read_text())["source"]["problems"]
    assert {f"{reason}: {count:,}" for reason, count in found.items()} <= set(notes)
    named = [next(k for k in found if re.search(pattern, k)) for pattern in patterns]
    assert sorted(named) == sorted(found), "each by one pattern, and no others"
    return [found[reason] for reason in named]


def documents(folder: Path, split: str) -> list[str]:
    """The decoded documents of a split, told apart by the recorded ends."""
    dataset = open_dataset(folder, split)  # type: ignore[arg-type]
    ends, base = [], 0
    for shard in dataset.shards:
        ends += [base + int(end) for end in np.fromfile(shard.path.with_suffix(".ends"), "<u8")]
        base += shard.n_tokens
    assert len(ends) == dataset.n_documents
    assert ends[-1] == dataset.n_tokens
    tokenizer = Tokenizer.from_file(str(dataset.tokenizer_path))
    tokens = dataset.read(0, dataset.n_tokens)
    texts = []
    for start, end in zip([0, *ends], ends, strict=False):
        assert tokens[end - 1] == dataset.end_of_text
        texts.append(tokenizer.decode(tokens[start : end - 1].tolist()))
    assert sum(len(text.encode()) for text in texts) == dataset.n_bytes
    return texts


@pytest.mark.parametrize("tokenizer", ["bpe:300", "bytes", "chars"])
def test_every_document_comes_back_once_whatever_the_tokenizer(
    tmp_path: Path, tokenizer: str
) -> None:
    texts = make_texts(200)
    texts[7] += "<|endoftext|> is text here"
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    run(tmp_path / "out", source, tokenizer=tokenizer, val_fraction=0.1, shard_tokens=1000)
    train, val = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(texts)
    assert [text for text in texts if text in set(train)] == train  # in order of the input
    assert 5 < len(val) < 40


def test_the_split_is_by_content_and_stable_when_data_is_added(tmp_path: Path) -> None:
    texts = make_texts(120)
    run(
        tmp_path / "one",
        write_jsonl(tmp_path / "a.jsonl", texts),
        tokenizer="bytes",
        val_fraction=0.2,
    )
    more = [*make_texts(80, seed=1), *reversed(texts), *texts[:10]]
    run(
        tmp_path / "two",
        write_jsonl(tmp_path / "b.jsonl", more),
        tokenizer="bytes",
        val_fraction=0.2,
    )
    val = {k: set(documents(tmp_path / k, "val")) for k in ("one", "two")}
    train = {k: set(documents(tmp_path / k, "train")) for k in ("one", "two")}
    assert val["one"] <= val["two"]
    assert train["one"] <= train["two"]
    assert not val["two"] & train["two"]


@pytest.mark.parametrize("lines", [1, 400, 60_000])
def test_one_document_is_cut_by_position(tmp_path: Path, lines: int) -> None:
    text = "".join(f"line {number} of the only text\n" for number in range(lines))
    (tmp_path / "book.txt").write_text(text)
    run(tmp_path / "out", tmp_path / "book.txt", tokenizer="bytes", val_fraction=0.05)
    (train,), (val,) = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert train + val == text
    assert len(val) / len(text) == pytest.approx(0.05, abs=0.05 if lines == 1 else 0.02)
    assert lines == 1 or train.endswith("\n")


def test_few_documents_still_give_a_validation_split(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(make_texts(6)):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    run(tmp_path / "out", tmp_path / "texts", tokenizer="bpe:260", val_fraction=0.005)
    (val,) = documents(tmp_path / "out", "val")  # the end of one
    train = documents(tmp_path / "out", "train")
    assert len(train) == 6
    assert 0 < len(val.encode()) <= 0.01 * sum(len(text.encode()) for text in [*train, val])
    run(tmp_path / "none", tmp_path / "texts", tokenizer="bytes", val_fraction=0)
    assert len(documents(tmp_path / "none", "train")) == 6
    with pytest.raises(DataError, match=r"dataset\.json: .*'val'.*--val-fraction"):
        open_dataset(tmp_path / "none", "val")


@pytest.mark.parametrize("mean_bytes", [300, 27_000])
def test_of_a_small_text_enough_is_held_out(tmp_path: Path, mean_bytes: int) -> None:
    """As of 63 documents, 1.7 MB: a twentieth to a tenth, some 25,000 tokens, whole documents."""
    sizes, texts, total = random.Random(0), [], 0
    while total < 1_700_000:
        lines = "a line of some text\n" * int(sizes.expovariate(20 / mean_bytes))
        texts.append(f"{len(texts)}: {lines}")
        total += len(texts[-1])
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    notes = run(tmp_path / "out", source, tokenizer="bytes")
    assert not of_few(notes)
    train, val = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert len(train) + len(val) == len(texts) == len({*train, *val})
    assert 100_000 <= sum(map(len, val)) <= 0.1 * total
    assert len(val) > 2
    run(tmp_path / "again", source, tokenizer="bytes")
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_of_few_large_documents_the_ends_are_held_out(tmp_path: Path) -> None:
    large = ["".join(f"{name}, line {n}\n" for n in range(30_000)) for name in "abc"]
    texts = [large[0], "small\n", *large[1:], "little\n"]
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    run(tmp_path / "out", source, tokenizer="bytes")
    train, val = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert len(val) == 3
    assert [t + v for t, v in zip((train[0], *train[2:4]), val, strict=True)] == large
    assert (train[1], train[4]) == ("small\n", "little\n")
    assert 0.05 < sum(map(len, val)) / sum(map(len, texts)) <= 0.1


def test_a_text_of_20_MB_is_split_as_it_always_was(tmp_path: Path) -> None:
    """So is one that is smaller while it is compressed."""
    block = "a line of a text that is long enough\n" * 130
    source = write_jsonl(tmp_path / "in.jsonl", [f"{n}\n{block}" for n in range(4200)])
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(source.read_bytes(), 1))
    for path in (source, tmp_path / "in.jsonl.gz"):
        found = [
            [
                piece.where
                for piece in Splitter(Source([local_file(path)]), fraction).pieces()
                if piece.split == "val"
            ]
            for fraction in (None, 0.005)
        ]
        assert found[0] == found[1]
        assert 5 < len(found[0]) < 50


def of_few(notes: list[str]) -> list[str]:
    """Return what is told of a validation split that is too small."""
    return [note for note in notes if re.search(r"\bvalidat", note)]


def test_few_tokens_to_validate_on_are_told(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", make_texts(60))
    for fraction in (None, 0.02):
        notes = run(tmp_path / str(fraction), source, tokenizer="bytes", val_fraction=fraction)
        (told,) = of_few(notes)
        assert f"{open_dataset(tmp_path / str(fraction), 'val').n_tokens:,} tokens" in told
        assert ("--val-fraction 0.1" in told) == (fraction is not None)
    val = documents(tmp_path / "None", "val")
    assert len(val) >= 3
    notes = run(tmp_path / "no", source, tokenizer="bytes", val_fraction=0)
    assert not of_few(notes)


def test_a_bpe_is_trained_on_the_training_split_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def spy(texts: Iterator[str], vocab_size: int, pattern: str) -> Tokenizer:
        seen.extend(texts)
        return train_bpe(seen, vocab_size, pattern=pattern)

    monkeypatch.setattr(build, "train_bpe", spy)
    source = write_jsonl(tmp_path / "in.jsonl", make_texts(100))
    run(tmp_path / "out", source, tokenizer="bpe:300", val_fraction=0.2)
    assert sorted(seen) == sorted(documents(tmp_path / "out", "train"))


def test_any_tokenizer_json_and_two_equal_runs(tmp_path: Path) -> None:
    texts = make_texts(50)
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    tokenizer = train_bpe(texts, 320)
    tokenizer.save(str(tmp_path / "mine.json"))
    for name in ("one", "two"):
        run(tmp_path / name, source, tokenizer=str(tmp_path / "mine.json"), val_fraction=0.1)
    assert sorted(documents(tmp_path / "one", "train") + documents(tmp_path / "one", "val")) == (
        sorted(texts)
    )
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    with pytest.raises(DataError, match=r"--tokenizer gpt2: .*bpe:N.*\bbytes\b.*\bchars\b"):
        run(tmp_path / "out", source, tokenizer="gpt2")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json: .*\btokenizers\b"):
        run(tmp_path / "out", source, tokenizer=str(tmp_path / "bad.json"))
    for wrong, match in (("bpe:many", r"bpe:many: .*bpe:32768"), ("bpe:100", r"\b257\b.*\b100\b")):
        with pytest.raises(DataError, match=match):
            run(tmp_path / "out", source, tokenizer=wrong)
    assert not (tmp_path / "out").exists()


def test_text_that_tiktoken_splits_otherwise_is_encoded_by_tokenizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package_or_skip("tiktoken")
    source = write_jsonl(tmp_path / "in.jsonl", make_texts(300))
    options = {"tokenizer": "bpe:300", "shard_tokens": 1000}
    monkeypatch.setattr(build, "BATCH_CHARS", 9000)
    monkeypatch.setattr(build, "CHECKPOINT_S", 0.0)
    run(tmp_path / "one", source, **options)
    compare, n_batches = Encoder._compare, 0

    def other(self: Encoder, texts: list[str]) -> None:
        nonlocal n_batches
        n_batches += 1
        if n_batches == 3:  # after shards, and a place to resume from, were written
            raise OtherIdsError("after 'x'")
        compare(self, texts)

    monkeypatch.setattr(Encoder, "_compare", other)
    notes = run(tmp_path / "two", source, **options)
    assert any(re.search(r"tiktoken.*after 'x'.*\btokenizers\b", note) for note in notes)
    assert n_batches == 3
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_tokenizer_without_an_end_of_text_is_used_and_said(tmp_path: Path) -> None:
    tokenizer = char_tokenizer("ab\n")
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = []
    (tmp_path / "t.json").write_text(json.dumps(state))
    source = write_jsonl(tmp_path / "in.jsonl", ["ab", "ba", "bb"])
    notes = run(tmp_path / "out", source, tokenizer=str(tmp_path / "t.json"), val_fraction=0)
    assert any("end-of-text" in note for note in notes)
    dataset = open_dataset(tmp_path / "out", "train")
    assert dataset.end_of_text is None
    assert dataset.read(0, 6).tolist() == [1, 2, 2, 1, 2, 2]


def package_or_skip(name: str) -> object:
    return pytest.importorskip(name, reason=f"needs the optional package {name}")


def as_zst(data: bytes) -> bytes:
    return package_or_skip("pyarrow").Codec("zstd").compress(data, asbytes=True)  # type: ignore


@pytest.mark.parametrize("packed", [gzip.compress, as_zst], ids=["gz", "zst"])
def test_compressed_input_reads_like_plain(
    tmp_path: Path, packed: Callable[[bytes], bytes]
) -> None:
    ending = ".gz" if packed is gzip.compress else ".zst"
    texts = make_texts(40)
    lines = write_jsonl(tmp_path / "a.jsonl", texts[:20]).read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"a.jsonl{ending}").write_bytes(packed(lines[:500]) + packed(lines[500:]))
    for number, text in enumerate(texts[20:]):
        (tmp_path / "in" / f"b{number:02d}.txt{ending}").write_bytes(packed(text.encode()))
    run(tmp_path / "out", tmp_path / "in", tokenizer="bytes", val_fraction=0)
    assert documents(tmp_path / "out", "train") == texts
    (tmp_path / "in" / f"a.jsonl{ending}").write_bytes(b"not compressed at all")
    with pytest.raises(DataError, match=rf"a\.jsonl\{ending}: .*\bcompressed\b"):
        run(tmp_path / "bad", tmp_path / "in", tokenizer="bytes")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("packed", [gzip.compress, as_zst], ids=["gz", "zst"])
def test_compressed_text_that_is_cut_off_is_refused(
    tmp_path: Path,
    packed: Callable[[bytes], bytes],
    kind: str,
    strict: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ending = ".gz" if packed is gzip.compress else ".zst"
    lines = [
        json.dumps({"text": random.Random(n).randbytes(300).hex()}) + "\n" for n in range(1200)
    ]
    first, second = (packed("".join(half).encode()) for half in (lines[::2], lines[1::2]))
    path = tmp_path / f"in.{kind}{ending}"
    whole = first + second
    # In the first frame; in the header, the middle, and the last byte of the second; before all.
    for size in (len(first) // 2, len(first) + 2, len(first) + len(second) // 2, len(whole) - 1, 0):
        path.write_bytes(whole[:size])
        arguments = [str(tmp_path / "out"), "--input", str(path), "--tokenizer", "bytes"]
        assert main([*arguments, *["--strict"] * strict]) == 2, size
        said = capsys.readouterr().err
        assert re.match(rf"error: {re.escape(str(path))}: .*(cut off|truncated)", said)
        assert not (tmp_path / "out").exists()
    path.write_bytes(whole + bytes(3000) * (ending == ".gz"))  # padded, as gzip allows
    assert main(arguments) == 0


def test_parquet(tmp_path: Path) -> None:
    arrow = package_or_skip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts: list[str | None] = [*make_texts(600), None, ""]
    parquet.write_table(arrow.table({"body": texts}), tmp_path / "t.parquet")  # type: ignore[attr-defined]
    notes = run(
        tmp_path / "out",
        tmp_path / "t.parquet",
        tokenizer="bytes",
        val_fraction=0,
        text_field="body",
    )
    assert documents(tmp_path / "out", "train") == texts[:600]
    assert problems(tmp_path / "out", notes, "'body'", r"\bempty\b") == [1, 1]
    with pytest.raises(DataError, match=r"t\.parquet: .*'text'.*--text-field body"):
        run(tmp_path / "no", tmp_path / "t.parquet", tokenizer="bytes")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"t\.parquet: .*\bParquet\b"):
        run(tmp_path / "no", tmp_path / "t.parquet", tokenizer="bytes")


def write_troubled(path: Path) -> Path:
    good = json.dumps({"text": "fine"}).encode()
    lines = [
        good,
        b'{"text": "caf\xe9"}',
        b"{broken",
        b"[1]",
        b'{"other": "x"}',
        b'{"text": 3}',
        b"",
        b'{"text": ""}',
        b'{"text": "half \\ud800 pair"}',
        good[:-1] + b', "n": 1}',
    ]
    path.write_bytes(b"\n".join(lines))
    return path


def test_problems_are_counted_reported_and_recorded(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo \xe9\nthree")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "honest.txt").write_text("\ufeffa text that says \ufffd itself")
    inputs = [write_troubled(tmp_path / "in.jsonl"), *sorted(tmp_path.glob("*.txt"))]
    notes = run(tmp_path / "out", *inputs, tokenizer="bytes", val_fraction=0)
    expected = {
        r"^bytes\b.*U\+FFFD": 2,
        r"^documents\b.*U\+FFFD": 3,
        r"\bempty\b": 2,
        r"\bJSON\b": 2,
        "'text'": 2,
    }
    assert problems(tmp_path / "out", notes, *expected) == list(expected.values())
    assert documents(tmp_path / "out", "train") == [
        "fine", "caf\ufffd", "half \ufffd pair", "fine",
        "a text that says \ufffd itself", "one\ntwo \ufffd\nthree",
    ]  # fmt: skip


def test_strict_ends_at_the_first_problem_with_file_and_line(tmp_path: Path) -> None:
    content = write_troubled(tmp_path / "in.jsonl").read_bytes().split(b"\n")
    for number, match in (
        (1, "UTF-8"),
        (2, "JSON"),
        (4, "'text'"),
        (7, "empty"),
        (8, "UTF-8"),
    ):
        (tmp_path / "in.jsonl").write_bytes(b"\n".join([content[0], content[0], content[number]]))
        with pytest.raises(DataError, match=rf"in\.jsonl:3: .*{match}.*--strict"):
            run(tmp_path / "out", tmp_path / "in.jsonl", tokenizer="bytes", strict=True)
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo \xe9\nthree")
    with pytest.raises(DataError, match=r"latin\.txt:2: .*UTF-8.*--strict"):
        run(tmp_path / "out", tmp_path / "latin.txt", tokenizer="bytes", strict=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    texts = make_texts(30)
    data = "".join(json.dumps({"text": t}) + "\n" for t in texts) if kind == "jsonl" else texts[0]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
    run(tmp_path / "out", "-", tokenizer="bytes", val_fraction=0)
    assert documents(tmp_path / "out", "train") == (texts if kind == "jsonl" else texts[:1])


@pytest.mark.parametrize("piece_chars", [60, 700])  # cut between words, cut between lines
def test_pieces_of_a_large_text_give_the_tokens_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_chars: int
) -> None:
    text = "".join(make_texts(900)) + "x\n\n\n   deep\n" * 50
    tokenizer = train_bpe([text], 400)
    tokenizer.save(str(tmp_path / "t.json"))
    (tmp_path / "in.txt").write_text(text)
    monkeypatch.setattr(sources, "PIECE_CHARS", piece_chars)
    pieces = list(next(Source([local_file(tmp_path / "in.txt")]).documents()).pieces())
    assert len(pieces) > len(text) // piece_chars // 2 > 50
    assert "".join(pieces) == text
    run(tmp_path / "out", tmp_path / "in.txt", tokenizer=str(tmp_path / "t.json"), val_fraction=0)
    dataset = open_dataset(tmp_path / "out", "train")
    assert dataset.read(0, dataset.n_tokens - 1).tolist() == tokenizer.encode(text).ids


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", make_texts(5))
    (tmp_path / "out").mkdir()
    run(tmp_path / "out", source, tokenizer="bytes")  # an empty folder is as good as none
    with pytest.raises(DataError, match=r"/out: .*\bexists\b.*\bdataset\b"):
        run(tmp_path / "out", source, tokenizer="bytes")
    before = sorted(tmp_path.rglob("*"))
    for fraction in (-0.1, 1.0, 2):
        with pytest.raises(DataError, match=rf"--val-fraction .* {re.escape(str(fraction))}\b"):
            run(tmp_path / "new", source, val_fraction=fraction)
    with pytest.raises(DataError, match="shard_tokens"):
        run(tmp_path / "new", source, tokenizer="bytes", shard_tokens=0)
    with pytest.raises(DataError, match=r"\binput\b.*\b2 empty\b"):
        run(tmp_path / "new", write_jsonl(tmp_path / "in.jsonl", ["", ""]), tokenizer="bytes")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    write_jsonl(tmp_path / "in.jsonl", make_texts(5))
    monkeypatch.setattr(build, "write_dataset_json", full)
    with pytest.raises(DataError, match=r"/new: .*\(No space left on device\)"):
        run(tmp_path / "new", source, tokenizer="bytes")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", make_texts(60))
    out = str(tmp_path / "out")
    command = [out, "--input", str(source), "--tokenizer", "bpe:300", "--val-fraction", "0.09"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in (f"data.path={out}", "--val-fraction 0.1"))
    assert main(["--inspect", out]) == 0
    shown = capsys.readouterr().out
    for part in ("^train: ", "^val: ", r"\b300 tokens\b", r"\bfrequent\b", r"\b5 files\b.*SHA-256"):
        assert re.search(part, shown, re.MULTILINE)
    assert len(re.findall(r"\btoken [\d,]+: ", shown)) == 6
    assert main(command) == 2
    said = capsys.readouterr().err
    assert re.match(rf"error: {re.escape(out)}: .*\bexists\b.*\bdataset\b", said)
    for name in ("train_000000.ends", "train_000000.bin", "tokenizer.json"):
        path = tmp_path / "out" / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert main(["--inspect", out]) == 2
        assert name in capsys.readouterr().err
        path.write_bytes(content)
    assert main(["--inspect", str(tmp_path)]) == 2
    for wrong in ([], [out], [out, "--inspect", out]):
        with pytest.raises(SystemExit) as exit_info:
            main(wrong)
        assert exit_info.value.code == 2


@pytest.mark.parametrize("megabytes", [200, pytest.param(2000, marks=pytest.mark.soak)])
def test_memory_stays_flat(tmp_path: Path, megabytes: int) -> None:
    block = "".join(make_texts(3000)).encode()
    with (tmp_path / "in.txt").open("wb") as file:
        for _ in range(megabytes * 1_000_000 // len(block) + 1):
            file.write(block)
    script = (
        "import re, sys; from pathlib import Path; from fasttrain.prepare import main\n"
        "status = main(sys.argv[1:])\n"
        # not ru_maxrss, which a child inherits from a large parent
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "sys.exit(status)\n"
    )
    arguments = [str(tmp_path / "out"), "--input", str(tmp_path / "in.txt"), "--tokenizer", "bytes"]
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300 + megabytes)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) < 1_500_000  # KiB
    assert open_dataset(tmp_path / "out", "train").n_tokens > 990_000 * megabytes


def test_inputs_are_found_sorted_once_and_unknown_endings_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    for name in ("b.txt", "a.md", "sub/c.jsonl", "sub/d.TXT.gz", "image.png", "code.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files, left_out = find_files([str(tmp_path), str(tmp_path / "b.txt"), "-", "-"])
    names = ["a.md", "b.txt", "c.jsonl", "d.TXT.gz", "standard input"]
    assert [Path(str(file)).name for file in files] == names
    unknown = [str(tmp_path / name) for name in ("code.py", "image.png")]
    reasons = {tuple(names): reason for reason, names in left_out.items()}
    assert reasons.keys() == {tuple(unknown), (str(tmp_path / "b.txt"),)}
    assert "ending" in reasons[tuple(unknown)]
    files, _ = find_files([str(tmp_path / "**" / "*.py")])
    assert [Path(file.path).name for file in files] == ["code.py"]
    for name in ("missing.txt", "*.doc"):
        wanted = re.escape(f"--input {tmp_path / name}: ")
        with pytest.raises(DataError, match=rf"^{wanted}(?!.*--input)"):
            find_files([str(tmp_path / name)])
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"/none: .*\.jsonl\b.*--input '\S*/none/\*\*/\*\.py'"):
        find_files([str(tmp_path / "none")])


@pytest.mark.parametrize(("name", "package"), [("a.txt.zst", "pyarrow"), ("a.parquet", "pyarrow")])
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    def missing(wanted: str) -> None:
        raise ImportError(wanted)

    monkeypatch.setattr(inputs.importlib, "import_module", missing)
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(DataError, match=rf"{re.escape(name)}: .*pip install {package}\b"):
        list(Source([local_file(tmp_path / name)]).documents())
