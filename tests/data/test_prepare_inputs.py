"""What an input is: which files, what they hold, in which encoding, and how much is held out."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fasttrain.data.format import open_dataset
from fasttrain.prepare import prepare, sources
from fasttrain.prepare.build import merge
from fasttrain.prepare.inputs import find_files, local_file
from fasttrain.prepare.sources import Source, Splitter
from fasttrain.storage import DataError
from tests.support.toy import wait_until

TEXTS = [f"document {n}: naïve “words”, 日本語 and a line\n" * (n + 1) for n in range(12)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)


def texts_of(*names: Path | str, separator: str = "", **options: str) -> list[str]:
    files = find_files(list(map(str, names)), **options).files
    source = Source(files, separator=separator, **options)  # type: ignore[arg-type]
    return ["".join(document.pieces()) for document in source.documents()]


def run(out: Path, *inputs: Path | str, **options: object) -> list[str]:
    notes: list[str] = []
    options = {"tokenizer": "bytes", "val_fraction": 0} | options
    prepare(out, list(map(str, inputs)), note=notes.append, **options)  # type: ignore[arg-type]
    return notes


def reason_of(left_out: dict[str, dict[str, None]], *names: str) -> str:
    """Return why just these files were left out."""
    (reason,) = (
        reason
        for reason, found in left_out.items()
        if {Path(name).name for name in found} == {*names}
    )
    return reason


def zst(content: bytes) -> bytes:
    arrow = pytest.importorskip("pyarrow", reason="needs the extra data")
    return bytes(arrow.Codec("zstd").compress(content, asbytes=True))


def tar(members: dict[str, bytes], mode: str = "w") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return packed.getvalue()


# ------------------------------------------------------------------ what is held out


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz"])
@pytest.mark.parametrize("fraction", [None, 0.005, 0.05, 0.3])
@pytest.mark.parametrize(
    "sizes",
    [[1], [1, 1], [1, 1, 1], [1] * 5, [1, 100], [1] * 30, [1] * 40 + [400]],
    ids=["one", "two", "three", "five", "small-and-large", "thirty", "many-and-large"],
)
def test_R34_the_promised_share_of_bytes_is_held_out_whatever_the_sizes_of_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], fraction: float, kind: str
) -> None:
    monkeypatch.setattr(sources, "SMALL_BYTES", 200_000)
    monkeypatch.setattr(sources, "VAL_BYTES", 1000)
    for total in (1500, 60_000, 400_000):
        texts = [
            f"{n}\n" + "a line of é\n" * (s * total // sum(sizes) // 13)
            for n, s in enumerate(sizes)
        ]
        folder = tmp_path / str(total)
        folder.mkdir()
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        if kind == "txt":
            for n, text in enumerate(texts):
                (folder / f"{n:03}.txt").write_text(text)
        else:
            (folder / f"in.{kind}").write_bytes(gzip.compress(lines) if "gz" in kind else lines)
        splitter = Splitter(Source(find_files([str(folder)]).files), fraction)
        pieces = list(splitter.pieces())
        joined = {"train": 0, "val": 0}
        for piece in pieces:
            joined[piece.split] += len(piece.text.encode())
        assert sum(joined.values()) == sum(len(text.encode()) for text in texts)
        wanted = splitter.val_fraction * sum(joined.values())
        assert 0.45 * wanted <= joined["val"] <= 2 * max(wanted, 2)


def test_R34_what_records_hold_beside_their_text_does_not_change_the_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SMALL_BYTES", 200_000)
    monkeypatch.setattr(sources, "VAL_BYTES", 1000)
    records = [{"image": "0" * 20_000, "text": f"{n}\n" + "a line\n" * 40} for n in range(100)]
    text_bytes = sum(len(record["text"]) for record in records)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    out, source = tmp_path / "out", tmp_path / "in.jsonl"
    prepare(out, [str(source)], tokenizer="bytes", workers=1)
    held = open_dataset(out, "val").n_tokens
    wanted = min(1000, text_bytes / 10)
    assert wanted / 2 <= held <= 2 * wanted


def test_documents_that_are_small_stay_where_their_hash_puts_them(tmp_path: Path) -> None:
    """A large text of them is split as one of earlier versions."""
    block = "a line of a text that is long enough\n" * 30
    lines = [json.dumps({"text": f"{n}\n{block}"}) + "\n" for n in range(20_000)]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    source = Source([local_file(tmp_path / "in.jsonl")])
    held = [p.where for p in Splitter(source, 0.005).pieces() if p.split == "val"]
    digests = [
        hashlib.sha256("".join(document.pieces()).encode()).digest()
        for document in source.documents()
    ]
    hashes = [int.from_bytes(digest[:4]) / 2**32 for digest in digests]
    assert [int(where.rpartition(":")[2]) for where in held] == [
        number for number, share in enumerate(hashes, 1) if share < 0.005
    ]


def test_a_preparation_that_an_earlier_rule_began_is_not_continued(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a text\n" * 100)
    run(tmp_path / "out", tmp_path / "in.txt")
    record = tmp_path / "out/prepared.json"
    asked = json.loads(record.read_text())
    asked["recipe"][0] = 1
    record.write_text(json.dumps(asked))
    assert open_dataset(tmp_path / "out", "train").n_tokens == 701  # it stays valid
    with pytest.raises(DataError, match=r"/out: .*\btokenizers = \[1, "):
        run(tmp_path / "out", tmp_path / "in.txt", resume=True)


# ------------------------------------------------------------------ what a file holds

PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zst,
}


@pytest.mark.parametrize("name", ["c4.json", "c4.ndjson", "c4.jsonl", "c4", "c4.data", "c4.txt"])
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("says_so", [True, False], ids=["ending", "no-ending"])
def test_json_lines_are_recognised_under_any_name(
    tmp_path: Path, name: str, packed: str, says_so: bool
) -> None:
    path = tmp_path / "in" / f"{name}{packed if says_so else ''}"
    path.parent.mkdir()
    path.write_bytes(PACKED[packed](LINES.encode()))
    assert texts_of(path) == texts_of(path.parent) == TEXTS


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("kind", ["array", "objects"])
def test_json_on_any_number_of_lines_is_read_record_by_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None, kind: str
) -> None:
    records = [{"id": n, "text": text} for n, text in enumerate(TEXTS)]
    each = "\n".join(json.dumps(record, indent=indent) for record in records)
    path = tmp_path / "in.json"
    path.write_text(json.dumps(records, indent=indent) if kind == "array" else each)
    assert texts_of(path) == texts_of(tmp_path) == TEXTS
    path.write_text(path.read_text()[:-40])
    if kind == "array" or indent:
        with pytest.raises(DataError, match=r"in\.json: record 12: .*\bJSON\b"):
            texts_of(path)


@pytest.mark.parametrize("archive", ["tar", "tar.gz", "tgz", "zip", "no-ending"])
def test_the_files_in_an_archive_are_read_as_those_of_a_folder(
    tmp_path: Path, archive: str
) -> None:
    members = {
        "data/a.jsonl.gz": gzip.compress(LINES.encode()),
        "data/b.txt": "a plain text é\n".encode() * 40_000,
        "data/.hidden.txt": b"hidden",
        "data/picture.png": b"\x89PNG\r\n\x1a\n\x00\x00\x00",
        "data/c": "".join(json.dumps({"text": f"c {n}"}) + "\n" for n in range(3)).encode(),
    }
    content = (
        zipped(members) if archive == "zip" else tar(members, "w:gz" if "gz" in archive else "w")
    )
    path = tmp_path / f"in.{archive}"
    path.write_bytes(content)
    assert texts_of(path) == [*TEXTS, "a plain text é\n" * 40_000, "c 0", "c 1", "c 2"]
    notes = run(tmp_path / "out", path)
    assert any(re.search(r"\barchives\b.*: 1$", line) for line in notes)
    assert open_dataset(tmp_path / "out", "train").n_documents == len(TEXTS) + 4
    outer = tmp_path / "outer.tar"
    outer.write_bytes(tar({"in.zip": zipped({"a.txt": b"a"})}))
    with pytest.raises(DataError, match=r"/in\.zip: .*\barchive\b.*/outer\.tar"):
        texts_of(outer)


@pytest.mark.parametrize("kind", ["jsonl.gz", "array", "tar", "utf-16", "parquet"])
def test_standard_input_is_looked_at_like_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    arrow = pytest.importorskip("pyarrow", reason="needs the extra data")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = io.BytesIO()
    parquet.write_table(arrow.table({"text": TEXTS}), rows)
    content = {
        "jsonl.gz": gzip.compress(LINES.encode()),
        "array": json.dumps([{"text": text} for text in TEXTS]).encode(),
        "tar": tar({"a.jsonl": LINES.encode()}),
        "utf-16": LINES.encode("utf-16"),
        "parquet": rows.getvalue(),
    }[kind]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert texts_of("-") == TEXTS


def test_what_is_not_text_is_refused_by_name_and_left_out_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("a text")
    for name, content, why in (
        ("x.pdf", b"%PDF-1.7\n", "PDF"),
        ("x.7z", b"7z\xbc\xaf\x27\x1c\x00", "7-Zip"),
        ("x.lz4", b"\x04\x22\x4d\x18aaaa", "lz4"),
        ("x.bin", bytes(range(256)) * 50, "binary"),
    ):
        (folder / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: .*{why}"):
            texts_of(folder / name)
    (folder / "code.py").write_text("x = {}\n")
    (folder / "package.json").write_text('{\n "name": "x"\n}\n')
    files, left_out = find_files([str(folder)])
    assert [Path(file.path).name for file in files] == ["a.txt", "package.json"]
    assert len(left_out) == 2
    assert "text" in reason_of(left_out, "x.7z", "x.bin", "x.lz4", "x.pdf")
    assert "ending" in reason_of(left_out, "code.py")
    assert texts_of(folder / "code.py") == ["x = {}\n"]
    (folder / "x.json").write_text("some words")
    with pytest.raises(DataError, match=r"x\.json: .*\bJSON\b.*--format text"):
        texts_of(folder / "x.json")
    assert texts_of(folder / "x.json", format="text") == ["some words"]


def test_a_format_that_is_named_is_the_one_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    assert texts_of(tmp_path / "a.jsonl", format="text") == [LINES]
    (tmp_path / "b.txt").write_text('{"text": "one line"}\n')
    assert texts_of(tmp_path / "b.txt") == ['{"text": "one line"}\n']
    assert texts_of(tmp_path / "b.txt", format="jsonl") == ["one line"]


SIX = {f"{n}.txt": f"text {n}".encode() for n in range(6)}


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("at", ["between members", "in a header", "damaged", "behind"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["tar", "tar.gz"])
def test_a_tar_archive_that_is_cut_or_damaged_is_refused(
    tmp_path: Path, at: str, pack: Callable[[bytes], bytes]
) -> None:
    whole = tar(SIX)
    content = {
        "between members": whole[:3072],
        "in a header": whole[:3272],
        "damaged": flipped(whole, 3072),
        "behind": whole + b"more" * 128,
    }[at]
    (tmp_path / "in").write_bytes(pack(content))
    with pytest.raises(DataError, match=r"/in: .*\barchive\b.*(\bend\b|\bbyte \d)"):
        texts_of(tmp_path / "in")


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["tar", "tar.gz"])
def test_tar_archives_one_after_another_are_all_read(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    more = tar({"b.txt": b"more"})
    (tmp_path / "in").write_bytes(pack(tar(SIX)) + pack(more))
    assert texts_of(tmp_path / "in") == [f"text {n}" for n in range(6)] + ["more"]


def test_a_gzip_checksum_behind_the_end_of_a_tar_archive_is_verified(tmp_path: Path) -> None:
    content = gzip.compress(tar(SIX))
    (tmp_path / "in").write_bytes(flipped(content, len(content) - 8))
    with pytest.raises(DataError, match=r"/in: .*CRC"):
        texts_of(tmp_path / "in")


@pytest.mark.parametrize("kind", [".gz", ".bz2", ".xz", ".zst"])
def test_what_follows_a_compressed_stream_is_another_or_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"in.txt{kind}"
    first, second = (PACKED[kind](text * 99) for text in (b"first\n", b"second\n"))
    path.write_bytes(first + second)
    assert texts_of(path) == ["first\n" * 99 + "second\n" * 99]
    for rest in (flipped(second, 0), flipped(second, 2), b"other bytes", second[:-9]):
        path.write_bytes(first + rest)
        with pytest.raises(DataError, match=rf"in\.txt\{kind}: ") as refused:
            texts_of(path)
        causes = (OSError, EOFError, zlib.error, lzma.LZMAError)  # of what unpacks it
        assert isinstance(refused.value.__cause__, causes)
    if kind == ".xz":
        path.write_bytes(first + bytes(8) + second + bytes(4))
        assert texts_of(path) == ["first\n" * 99 + "second\n" * 99]


@pytest.mark.parametrize("archive", ["tar", "tar.gz", "zip"])
def test_a_format_that_is_named_is_that_of_the_files_in_an_archive(
    tmp_path: Path, archive: str
) -> None:
    members = {"a.txt": LINES.encode(), "b.txt": LINES.encode()}
    path = tmp_path / f"in.{archive}"
    path.write_bytes(
        zipped(members) if archive == "zip" else tar(members, "w:gz" if "gz" in archive else "w")
    )
    assert texts_of(path, format="text") == [LINES] * 2
    assert texts_of(path, format="jsonl") == TEXTS * 2


@pytest.mark.parametrize("far", [False, True], ids=["local", "address"])
@pytest.mark.parametrize("n_chars", [10, 7_000, 200_000])
def test_long_records_and_blank_lines_between_them_are_json_lines(
    tmp_path: Path, n_chars: int, far: bool
) -> None:
    pytest.importorskip("fsspec", reason="needs the extra remote")
    path = tmp_path / "long.txt"
    path.write_text("\n\n".join(json.dumps({"text": f"{n}" * n_chars}) for n in range(4)))
    assert texts_of(f"file://{path}" if far else path) == [f"{n}" * n_chars for n in range(4)]


# ------------------------------------------------------------------ which files


def test_one_rule_says_which_files_a_folder_and_a_glob_mean(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name in ("a.txt", "sub/b.txt", ".git/c.txt", "._a.txt", "sub/.d.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/e.txt").write_text("out/e.txt")
    (folder / "f.txt").symlink_to(tmp_path / "out/e.txt")
    (folder / "linked").symlink_to(tmp_path / "out")
    (folder / "sub/circle").symlink_to(folder)
    os.link(folder / "a.txt", folder / "z.txt")
    expected = ["a.txt", "out/e.txt", "sub/b.txt"]
    for names in (
        [str(folder)],
        [f"{folder}/*"],
        [f"{folder}/**"],
        [f"{folder}/", f"{folder}/../in", f"{folder}/a.txt"],
        [os.path.relpath(folder), str(folder)],
    ):
        assert sorted(texts_of(*names)) == expected, names
    _, left_out = find_files([str(folder)])
    assert "hidden" in reason_of(left_out, ".git", "._a.txt", ".d.txt")
    assert reason_of(left_out, "e.txt", "z.txt")
    assert texts_of(folder / "._a.txt") == ["._a.txt"]  # it is named
    notes = run(tmp_path / "ds", folder)
    assert " 3 files " in notes[0]
    assert "3 hidden" in notes[0]


def test_a_glob_lists_what_is_hidden_and_refuses_folders_it_cannot_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/one.txt", "b/two.txt", "b/.three.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    files, left_out = find_files([f"{tmp_path}/*/*.txt"])
    assert [Path(file.path).name for file in files] == ["one.txt", "two.txt"]
    ((reason, names),) = left_out.items()
    assert "hidden" in reason
    assert list(names) == [f"{tmp_path}/b/.three.txt"]
    listed = os.listdir

    def refusing(folder: Path) -> list[str]:
        if folder.name == "b":
            raise PermissionError(13, "Permission denied")
        return listed(folder)

    monkeypatch.setattr(os, "listdir", refusing)
    for pattern in ("*/*.txt", "**/*.txt"):
        with pytest.raises(DataError, match=r"/b: .*\(Permission denied\)"):
            find_files([f"{tmp_path}/{pattern}"])


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_what_is_left_out_of_an_archive_is_told_with_its_name(tmp_path: Path, kind: str) -> None:
    packed = io.BytesIO()
    names = ("../a.txt", ".hidden/b.txt", "c.txt")
    if kind == "tar":
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(name)
                archive.addfile(info, io.BytesIO(name.encode()))
            link = tarfile.TarInfo("link.txt")
            link.type, link.linkname = tarfile.SYMTYPE, "c.txt"
            archive.addfile(link)
    else:
        with zipfile.ZipFile(packed, "w") as archive:
            for name in names:
                archive.writestr(name, name)
            entry = zipfile.ZipInfo("link.txt")
            entry.external_attr = 0o120777 << 16
            archive.writestr(entry, "c.txt")
    (tmp_path / "in").write_bytes(packed.getvalue())
    assert texts_of(tmp_path / "in") == ["../a.txt", "c.txt"]
    notes = run(tmp_path / "out", tmp_path / "in")
    for name, reason in ((".hidden/b.txt", "hidden"), ("link.txt", "link")):
        told = rf"{re.escape(f'{tmp_path}/in/{name}')}: .*\b{reason}\b"
        assert any(re.search(told, note) for note in notes)
        assert any(re.search(rf"\barchives\b.*\b{reason}\b.*: 1$", note) for note in notes)


def test_names_that_no_user_or_pattern_has_are_files_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("~nobody-of-this-name.txt").write_text("a text")
    assert texts_of("~nobody-of-this-name.txt") == ["a text"]
    for name, told in (("~no-such-user/x", "~no-such-user/x: "), ("", r"'': .*--input \.$")):
        with pytest.raises(DataError, match=f"--input {told}"):
            find_files([name])
    pytest.importorskip("fsspec", reason="needs the extra remote")
    with pytest.raises(DataError, match=r"--input \S*/\*\*\.jsonl: .*\*\*/\*\.jsonl"):
        find_files([f"file://{tmp_path}/**.jsonl"])


def test_what_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("a")
    (tmp_path / "in/b.txt").symlink_to("nowhere")
    for name in (f"{tmp_path}/in", f"{tmp_path}/in/*", f"{tmp_path}/in/b.txt"):
        with pytest.raises(DataError, match=r"b\.txt: .*'nowhere'"):
            find_files([name])
    (tmp_path / "in/b.txt").unlink()
    (tmp_path / "in/b.txt").write_text("b")
    if os.getuid():
        (tmp_path / "in/b.txt").chmod(0)
        with pytest.raises(DataError, match=r"b\.txt: .*Permission denied"):
            find_files([f"{tmp_path}/in"])


@pytest.mark.parametrize("change", ["grows", "replaced"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, change: str, kind: str
) -> None:
    path = tmp_path / f"in.{kind}"
    path.write_text(LINES if kind == "jsonl" else "a line\n" * 200_000)
    source = Source(find_files([str(path)]).files)
    splitter = Splitter(source, 0.1)
    pieces = splitter.pieces()
    next(pieces)
    if change == "grows":
        with path.open("a") as file:
            file.write("more\n")
    else:
        (tmp_path / "new").write_text(path.read_text().replace("line", "LINE"))
        os.replace(tmp_path / "new", path)
    with pytest.raises(DataError, match=rf"in\.{kind}: .*\bchanged\b"):
        list(pieces)


def test_a_pipe_by_name_is_read_once_and_copied(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = subprocess.Popen(
        [sys.executable, "-c", "import sys; open(sys.argv[1], 'w').write('a text')",
         str(tmp_path / "pipe")]
    )  # fmt: skip
    assert texts_of(tmp_path / "pipe") == ["a text"]
    assert writer.wait() == 0


def test_nothing_is_left_of_standard_input_when_the_process_is_killed(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "fasttrain.prepare", str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, "--input", "-", "--tokenizer", "bytes"],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": f"{tmp_path}/tmp", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(b"a line\n" * 500_000)
    process.stdin.flush()
    open_files = Path(f"/proc/{process.pid}/fd")

    def is_copying() -> bool:
        return any("(deleted)" in os.readlink(link) for link in open_files.iterdir())

    wait_until(is_copying)
    process.send_signal(signal.SIGKILL)
    process.stdin.close()
    process.wait()
    assert not list((tmp_path / "tmp").iterdir())


# ------------------------------------------------------------------ encodings, separators

SAMPLE = "Der naïve Straßenbau, “über” 日本語の文章。\n" * 50
ALL = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


@pytest.mark.parametrize("encoding", ALL)
@pytest.mark.parametrize(
    "text", [SAMPLE, "plain\n" * 9, "日本語の文章一二三" * 40], ids=["mixed", "ascii", "cjk"]
)
def test_unicode_is_recognised_with_and_without_a_mark(
    tmp_path: Path, encoding: str, text: str
) -> None:
    (tmp_path / "in.txt").write_bytes(text.encode(encoding))
    assert texts_of(tmp_path / "in.txt") == [text]
    assert texts_of(tmp_path / "in.txt", encoding=encoding) == [text]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for _ in range(3))
    (tmp_path / "in.jsonl").write_bytes(lines.encode(encoding))
    assert texts_of(tmp_path / "in.jsonl") == [text] * 3


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Le café est “très” agréable, déjà.\n" * 20),
        ("latin-1", "Le café est très agréable, déjà.\n" * 20),
        ("cp1251", "Это просто текст.\n" * 20),
        ("shift_jis", "日本語の文章。\n" * 20),
        ("gb18030", "这是一个句子。\n" * 20),
    ],
)
def test_another_encoding_is_refused_until_it_is_named(
    tmp_path: Path, encoding: str, text: str
) -> None:
    for name, content in (
        ("in.txt", text),
        ("in.jsonl", json.dumps({"text": text}, ensure_ascii=False) + "\n"),
    ):
        (tmp_path / name).write_bytes(content.encode(encoding))
        with pytest.raises(DataError, match=rf"{name}: .*\bUTF-8\b.*%\).*--encoding "):
            texts_of(tmp_path / name)
        assert texts_of(tmp_path / name, encoding=encoding) == [text]
        replaced = texts_of(tmp_path / name, encoding="utf-8")
        assert "\ufffd" in replaced[0]
    with pytest.raises(DataError, match="--encoding nonsense: "):
        run(tmp_path / "out", tmp_path / "in.txt", encoding="nonsense")


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_few_bad_bytes_are_counted_and_many_behind_a_good_beginning_refused(
    tmp_path: Path, kind: str
) -> None:
    line = b'{"text": "fine and good"}\n' if kind == "jsonl" else b"fine and good\n"
    bad = line.replace(b"good", b"g\xe9\xe8d")
    path = tmp_path / f"in.{kind}"
    path.write_bytes(line * 10_000 + bad * 3)
    notes = run(tmp_path / "few", path)
    n_bytes = open_dataset(tmp_path / "few", "train").n_bytes
    assert notes[1].endswith(f" 6 ({600 / n_bytes:.2g} %)")
    path.write_bytes(line * 10_000 + bad * 3000)
    with pytest.raises(DataError, match=rf"in\.{kind}: .*\b6,000\b.*--encoding NAME"):
        run(tmp_path / "many", path)


@pytest.mark.parametrize("encoding", ["iso2022_jp", "iso2022_jp_2", "iso2022_kr"])
def test_an_encoding_of_seven_bits_is_refused_until_it_is_named(
    tmp_path: Path, encoding: str
) -> None:
    text = ("한국어 문장. " if encoding == "iso2022_kr" else "日本語の文章。") * 20
    (tmp_path / "in.txt").write_bytes(f"Plain\n{text}\n".encode(encoding))
    with pytest.raises(DataError, match=r"in\.txt: .*--encoding iso2022_"):
        texts_of(tmp_path / "in.txt")
    assert texts_of(tmp_path / "in.txt", encoding=encoding) == [f"Plain\n{text}\n"]


def test_records_in_another_encoding_are_refused_in_a_folder_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    text = json.dumps({"text": "日本語"}, ensure_ascii=False) + "\n"
    (tmp_path / "b.json").write_bytes((text * 9).encode("iso2022_jp"))
    with pytest.raises(DataError, match=r"b\.json: .*--encoding iso2022_jp"):
        find_files([str(tmp_path)])
    lines = json.dumps({"text": "déjà vu"}, ensure_ascii=False) + "\n"
    (tmp_path / "b.json").write_bytes((lines * 9).encode("latin-1"))
    (tmp_path / "c.json").write_text("// a comment, as in tsconfig.json\n{}\n")
    with pytest.raises(DataError, match=r"b\.json: .*\bUTF-8\b.*--encoding"):
        find_files([str(tmp_path)])
    files, left_out = find_files([str(tmp_path)], encoding="latin-1")
    assert [Path(file.path).name for file in files] == ["a.txt", "b.json"]
    assert len(left_out) == 1
    assert "JSON" in reason_of(left_out, "c.json")


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "tar"])
def test_a_bad_byte_far_into_a_file_is_told_with_its_line(tmp_path: Path, kind: str) -> None:
    lines = 40_000 * b"nothing is wrong in this line\n"
    content = lines + b"\xe9\n" + lines + b"\0\n"
    path = tmp_path / f"in.{kind}"
    packed = {"txt": content, "txt.gz": gzip.compress(content, 1)}
    path.write_bytes(packed.get(kind) or tar({"in.txt": content}))
    where = f"{path}/in.txt" if kind == "tar" else str(path)
    with pytest.raises(DataError, match=rf"^{re.escape(where)}:40001: .*--strict"):
        run(tmp_path / "out", path, strict=True)
    assert re.search(r" 2 \(\S+ %\)", run(tmp_path / "out", path)[1])


def test_a_named_encoding_is_that_of_files_which_do_not_show_another(tmp_path: Path) -> None:
    text = "Le café est “très” agréable, déjà.\n" * 20
    for name in ("cp1252", "utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / f"{name}.txt").write_bytes(text.encode(name))
        lines = json.dumps({"text": text}, ensure_ascii=False) + "\n"
        (tmp_path / f"{name}.jsonl").write_bytes(lines.encode(name))
    assert texts_of(tmp_path, encoding="cp1252") == [text] * 8
    assert texts_of(tmp_path, encoding="cp1252", format="text")[1::2] == [text] * 4


@pytest.mark.parametrize("more", [bytes(50_000), ("wide " * 9_000).encode("utf-16-le")])
def test_nul_bytes_behind_a_good_beginning_are_bad_bytes(tmp_path: Path, more: bytes) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(b"fine and good\n" * 7_000 + more)
    with pytest.raises(DataError, match=r"in\.txt: .*\bUTF-8\b.*--encoding NAME"):
        texts_of(path)
    path.write_bytes(b"fine and good\n" * 7_000 + more[:6].replace(b"w", b"a"))
    notes = run(tmp_path / "few", path)
    assert re.search(rf" {more[:6].count(0)} \(\S+ %\)", notes[1])


@pytest.mark.parametrize("separator", ["<|endoftext|>", "</s>", "<|im_end|>"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_separators_in_the_text_are_told_and_end_documents_if_asked_for(
    tmp_path: Path, separator: str, kind: str
) -> None:
    parts = [f"a story of {n}\n" for n in range(50)]
    text = f"{separator}\n".join(parts) + f"{separator}\n"
    path = tmp_path / f"in.{kind}"
    path.write_text(json.dumps({"text": text}) + "\n" if kind == "jsonl" else text)
    notes = run(tmp_path / "one", path)
    (told,) = (line for line in notes if "--separator" in line)
    assert f"--separator '{separator}'" in told
    assert any(re.search(rf"{re.escape(separator)} .*: 50$", line) for line in notes)
    assert texts_of(path) == [text]
    assert texts_of(path, separator=separator) == parts
    notes = run(tmp_path / "many", path, separator=separator)
    assert open_dataset(tmp_path / "many", "train").n_documents == 50
    assert not any(separator in line for line in notes)


def test_a_separator_in_the_middle_of_a_long_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a line\n" * 5000 + "<|endoftext|>" + "a line\n" * 5000)
    notes = run(tmp_path / "out", tmp_path / "in.txt")
    assert any(re.search(r"<\|endoftext\|> .*: 1$", line) for line in notes)


@pytest.mark.parametrize("encoding", ["undefined", "idna", "punycode"])
def test_a_codec_that_is_no_encoding_of_texts_is_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "in.txt").write_text("a text")
    with pytest.raises(DataError, match=f"--encoding {encoding}: "):
        run(tmp_path / "out", tmp_path / "in.txt", encoding=encoding)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_an_encoding_that_needs_a_mark_is_refused_without_one(
    tmp_path: Path, encoding: str
) -> None:
    (tmp_path / "in.txt").write_text("a text é")
    for format in ("auto", "text"):
        with pytest.raises(
            DataError, match=rf"in\.txt: .*--encoding {encoding}\b.*\b{encoding}-le\b"
        ):
            texts_of(tmp_path / "in.txt", encoding=encoding, format=format)


def test_a_separator_may_be_an_empty_line(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\nmore\n\ntwo\n\n\n\nthree\n")
    assert run(tmp_path / "out", tmp_path / "in.txt", separator=r"\n\n")
    assert open_dataset(tmp_path / "out", "train").n_documents == 3


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("piece_chars", [1, 2, 3, 1 << 18])
def test_the_end_of_a_line_in_a_separator_may_be_that_of_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, piece_chars: int
) -> None:
    monkeypatch.setattr(sources, "PIECE_CHARS", piece_chars)
    text = "one\r\nmore\r\n\r\ntwo\n\nthree"
    content = json.dumps({"text": text}) if kind == "jsonl" else text
    (tmp_path / f"in.{kind}").write_bytes(content.encode())
    assert texts_of(tmp_path / f"in.{kind}", separator="\n\n") == ["one\r\nmore", "two", "three"]


def test_a_separator_that_the_text_does_not_hold_is_told(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one<eos>two")
    notes = run(tmp_path / "none", tmp_path / "in.txt", separator="</s>")
    assert len([line for line in notes if "--separator '</s>'" in line]) == 1
    notes = run(tmp_path / "some", tmp_path / "in.txt", separator="<eos>")
    assert not any("--separator" in line for line in notes)


# ------------------------------------------------------------------ records


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"content": "x", "id": 1}, r"content \(text\), id \(number\).*--text-field content"),
        ({"data": {"text": "x"}}, r"data\.text \(text\).*--text-field data\.text"),
        ({"text": ["x"]}, r"text \(list\).*--text-field NAME"),
        ({"text": None, "body": "x"}, r"text \(null\), body \(text\).*--text-field body"),
    ],
)
def test_where_no_record_has_a_text_the_fields_that_are_there_are_named(
    tmp_path: Path, record: dict[str, object], told: str
) -> None:
    (tmp_path / "in.jsonl").write_text((json.dumps(record) + "\n") * 9)
    with pytest.raises(DataError, match=rf"\b9\b.*'text'.*{told}"):
        run(tmp_path / "out", tmp_path / "in.jsonl")
    if "data" in record:
        run(tmp_path / "out", tmp_path / "in.jsonl", text_field="data.text")
        assert open_dataset(tmp_path / "out", "train").n_documents == 9


def test_a_file_without_a_text_beside_others_that_have_one_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "fine"}\n' * 9 + '{"id": 1}\n')
    (folder / "b.jsonl").write_text('{"body": "lost", "id": 1}\n' * 3)
    (folder / "c.json").write_text('{\n "name": "x"\n}\n')
    notes = run(tmp_path / "out", folder)
    b = str(folder / "b.jsonl")
    (named,) = (line for line in notes if b in line)
    fields = r"body \(text\), id \(number\)"
    assert re.search(rf"'text'.*{re.escape(b)}.*{fields}.*\b1 other file\b", named)
    assert any(re.search(r"'text'.*: 5$", line) for line in notes)


def test_a_document_of_which_the_end_is_held_out_counts_once(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"a line of {name}\n" * 2000)
    notes = run(tmp_path / "out", folder, val_fraction=0.1)
    assert " 3 documents" in notes[1]
    held_out = open_dataset(tmp_path / "out", "val").n_documents
    assert open_dataset(tmp_path / "out", "train").n_documents + held_out > 3
    for number in (1, 2):
        run(tmp_path / "whole", folder, val_fraction=0.1, shard_of=f"{number}/2")
    merged: list[str] = []
    merge(tmp_path / "whole", note=merged.append)
    assert merged[0] == notes[1]


def test_NULs_that_json_writes_count_as_bad_bytes(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(r'{"text": "nul\u0000x"}' + "\n" + '{"text": "fine"}\n')
    notes = run(tmp_path / "out", tmp_path / "in.jsonl")
    assert "bad bytes: 1 (" in notes[1]
    assert texts_of(tmp_path / "in.jsonl") == ["nul\ufffdx", "fine"]


def test_a_tar_archive_of_before_posix_is_read(tmp_path: Path) -> None:
    content = bytearray(tar({"a.txt": b"a text\n"}))
    content[257:265] = bytes(8)
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    (tmp_path / "old").write_bytes(content)
    assert texts_of(tmp_path / "old") == ["a text\n"]


def test_a_pipe_in_an_archive_is_told(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        pipe = tarfile.TarInfo("pipe.txt")
        pipe.type = tarfile.FIFOTYPE
        archive.addfile(pipe)
        info = tarfile.TarInfo("a.txt")
        info.size = 6
        archive.addfile(info, io.BytesIO(b"a text"))
    (tmp_path / "in.tar").write_bytes(packed.getvalue())
    notes = run(tmp_path / "out", tmp_path / "in.tar")
    assert any("pipe.txt" in line for line in notes)


def test_columns_of_parquet_are_text_or_named_by_their_type(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="needs the extra data")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "in.parquet"

    def write(column: object, path: Path = path) -> None:
        parquet.write_table(pa.table({"text.en": ["other"] * len(TEXTS), "text": column}), path)

    for column in (
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array([text.encode() for text in TEXTS]),
        pa.array([text.encode() for text in TEXTS], pa.large_binary()),
    ):
        write(column)
        assert texts_of(path) == TEXTS
    invalid = pa.array([b"\xe9\xe8"] * len(TEXTS)).view(pa.string())
    write(invalid)
    with pytest.raises(DataError, match=r"in\.parquet: .*\('utf-8' codec"):
        texts_of(path)
    two = pa.Table.from_arrays([pa.array(TEXTS)] * 2, names=["text", "text"])
    parquet.write_table(two, path)
    with pytest.raises(DataError, match=r"in\.parquet: .*\bcolumns\b.*'text'"):
        texts_of(path)
    write(pa.array([{"raw": text} for text in TEXTS]))
    with pytest.raises(DataError, match=r"'text'.*\bstruct<.*--text-field text\.raw"):
        texts_of(path)
    source = Source(find_files([str(path)]).files, field="text.raw")
    assert ["".join(document.pieces()) for document in source.documents()] == TEXTS
    for column, kind in (
        (pa.array([[text] for text in TEXTS]), "list"),
        (pa.array(range(12)), "int64"),
    ):
        write(column)
        with pytest.raises(DataError, match=rf"'text'.*\b{kind}\b.*--text-field"):
            texts_of(path)
    write(pa.array(TEXTS))
    write(pa.array([text.encode() for text in TEXTS]), tmp_path / "second.parquet")
    with pytest.raises(DataError, match=r"second\.parquet: .*\bbinary\b.*--encoding utf-8"):
        texts_of(tmp_path)
    assert texts_of(tmp_path, encoding="utf-8") == TEXTS * 2


@pytest.mark.parametrize("kind", ["line", "array", "separator"])
def test_a_record_that_has_no_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 1 << 20)
    long = json.dumps({"text": "a" * 8_000_000})
    first = json.dumps({"text": "short"})
    (tmp_path / "in").write_bytes(
        gzip.compress((f"[{first}, {long}]" if kind == "array" else f"{first}\n{long}\n").encode())
    )
    options = {"format": "text", "separator": "<eos>"} if kind == "separator" else {}
    with pytest.raises(DataError, match=r"in:( record )?[12]: .*\b1 MiB\b"):
        texts_of(tmp_path / "in", **options)


def test_zstd_with_a_long_window_is_told_how_to_be_unpacked(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs the extra data")
    # A frame whose header asks for a window of 2 GiB, with one raw block.
    frame = b"\x28\xb5\x2f\xfd" + bytes([0x00, 21 << 3]) + b"\x29\x00\x00hello"
    (tmp_path / "in.txt.zst").write_bytes(frame)
    with pytest.raises(DataError, match=r"in\.txt\.zst: .*\bwindow\b.*zstd -d --long=31"):
        texts_of(tmp_path / "in.txt.zst")


# ------------------------------------------------------------------ pieces of long documents


def sentencepiece(**options: object) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    for name, value in options.items():
        setattr(tokenizer, name, value)
    return tokenizer


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "prepend": lambda: sentencepiece(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ),
    "first": lambda: sentencepiece(
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    ),
    "always": lambda: sentencepiece(pre_tokenizer=pre_tokenizers.Metaspace()),
    "prefix-space": lambda: sentencepiece(
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "strip": lambda: sentencepiece(
        normalizer=normalizers.Strip(),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True),
    ),
    "byte-level": lambda: sentencepiece(
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False), decoder=decoders.ByteLevel()
    ),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("kind", ["words", "lines", "no spaces"])
def test_a_long_document_has_the_ids_of_the_whole_whatever_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    rng = random.Random(0)
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    text = {
        "words": " ".join(rng.choices(words, k=6000)),
        "lines": "".join(" ".join(rng.choices(words, k=9)) + "\n" for _ in range(800)),
        "no spaces": "".join(rng.choices("的一是不了人我在有他这中大来上国", k=30_000)),
    }[kind]
    tokenizer = MAKERS[name]()
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, show_progress=False, max_token_length=9
    )
    tokenizer.train_from_iterator([text[:4000]], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if "0x" not in t["content"]]
    (tmp_path / "t.json").write_text(json.dumps(state))
    (tmp_path / "in.txt").write_text(text)
    monkeypatch.setattr(sources, "PIECE_CHARS", 2500)
    monkeypatch.setattr(sources, "CONTEXT_CHARS", 200)
    run(tmp_path / "out", tmp_path / "in.txt", tokenizer=str(tmp_path / "t.json"))
    dataset = open_dataset(tmp_path / "out", "train")
    whole = Tokenizer.from_file(str(tmp_path / "t.json")).encode(text, add_special_tokens=False)
    assert dataset.read(0, dataset.n_tokens - 1).tolist() == whole.ids
