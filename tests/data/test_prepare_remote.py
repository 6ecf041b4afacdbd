"""Text at addresses gives the bytes that local files give, or an error, never a short dataset."""

import gzip
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fasttrain import storage as files
from fasttrain.data.format import open_dataset
from fasttrain.prepare import build, main, prepare
from fasttrain.prepare import inputs as inputs_module
from fasttrain.prepare.build import merge
from fasttrain.prepare.inputs import find_files
from fasttrain.prepare.sources import Source
from fasttrain.storage import DataError
from tests.support.faulty_server import (
    FAULTS,
    Answer,
    FaultyServer,
    folder_upstream,
    gcs_upstream,
    hub_upstream,
    proxy_upstream,
    serving,
)

REASON = "needs the extra remote"
pytest.importorskip("aiohttp", reason=REASON)
pytest.importorskip("fsspec", reason=REASON)
RANGE_BYTES = 5000  # fetched at once here
NAMES = ["a/one.txt", "a-b/two.jsonl", "three.jsonl.gz", "a/six.txt.zst", "seven.parquet"]
EACH_FORMAT = [*(("http", name) for name in NAMES), ("s3", "a/one.txt"), ("s3", "seven.parquet")]


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "PAUSE_S", 0.01)
    monkeypatch.setattr(files, "STALL_S", 3.0)  # far more than an answer takes here
    monkeypatch.setattr(files, "RANGE_BYTES", RANGE_BYTES)
    yield
    inputs_module._range.cache_clear()  # the next test's server may have the same port


def texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [
        f"{n}: " + "".join(f"{rng.randbytes(9).hex()} 日本 é\n" for _ in range(rng.randint(1, 20)))
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a file of each format, in an order that names and folders make."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(40, 0))
    (folder / "a-b").mkdir()
    (folder / "a").mkdir()
    (folder / "a/one.txt").write_text("".join(texts(30, 1)))
    (folder / "a-b/two.jsonl").write_text(lines)
    (folder / "three.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (folder / "five.md").write_text("short")
    (folder / "picture.png").write_bytes(b"no text")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra data")
    arrow = pytest.importorskip("pyarrow")
    packed = arrow.Codec("zstd").compress("".join(texts(60, 2)).encode(), asbytes=True)
    (folder / "a/six.txt.zst").write_bytes(packed)
    table = arrow.table({"n": list(range(300)), "text": texts(300, 3)})
    parquet.write_table(table, folder / "seven.parquet", row_group_size=70)
    return folder


@pytest.fixture
def web(corpus: Path) -> Iterator[FaultyServer]:
    with serving(folder_upstream(corpus)) as server:
        yield server


@pytest.fixture(scope="module")
def moto(corpus: Path) -> Iterator[int]:
    """The port of an S3 server that has the corpus in its bucket `texts`."""
    pytest.importorskip("s3fs", reason=REASON)
    server = pytest.importorskip("moto.server", reason="needs pip install 'moto[s3]' flask-cors")
    boto3 = pytest.importorskip("boto3")
    thread = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    thread.start()
    _, port = thread.get_host_and_port()
    secrets = {"aws_access_key_id": "AKIDEXAMPLE", "aws_secret_access_key": "wJalrXUtnFEMI"}
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **secrets)
    client.create_bucket(Bucket="texts")
    for path in corpus.rglob("*"):
        if path.is_file():
            key = f"in/{path.relative_to(corpus)}"
            client.put_object(Bucket="texts", Key=key, Body=path.read_bytes())
    yield port
    thread.stop()


@pytest.fixture
def s3(moto: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """What fails in front of it; credentials are in the environment, as for other tools."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # it has a pause of its own after each
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()  # they know another server
    with serving(proxy_upstream(moto)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
        yield server


def make(out: Path, *inputs: Path | str, **options: object) -> list[str]:
    notes: list[str] = []
    options = {"tokenizer": "bytes", "val_fraction": 0.1, "shard_tokens": 20_000} | options
    prepare(out, list(map(str, inputs)), note=notes.append, **options)  # type: ignore[arg-type]
    return notes


def content(out: Path) -> dict[str, bytes]:
    """All that is in a dataset, less where its text came from."""
    found = {path.name: path.read_bytes() for path in out.iterdir()}
    found.pop("prepared.json")
    meta = json.loads(found.pop("dataset.json"))
    meta["source"].pop("inputs")
    return found | {"dataset.json": json.dumps(meta).encode()}


def test_http_globs_and_folders_give_the_bytes_of_local_ones(
    tmp_path: Path, corpus: Path, web: FaultyServer
) -> None:
    make(tmp_path / "local", corpus)
    notes = make(tmp_path / "remote", f"{web.url}/")
    assert re.search(r"\b1 .*\bending\b.*picture\.png", notes[0])
    assert content(tmp_path / "local") == content(tmp_path / "remote")
    for pattern in ("**/*.txt", "*/*.*", "*.parquet", "a*/*.jsonl", "**/*[!g]"):
        here, _ = find_files([f"{corpus}/{pattern}"])
        there, _ = find_files([f"{web.url}/{pattern}"])
        names = [str(file).removeprefix(f"{web.url}/") for file in there]
        assert names == [str(Path(file.path).relative_to(corpus)) for file in here], pattern
    both, _ = find_files([f"{web.url}/five.md", str(corpus / "five.md"), f"{web.url}/*.md"])
    assert list(map(str, both)) == [f"{web.url}/five.md", str(corpus / "five.md")]
    for name in ("none.txt", "*.doc"):
        with pytest.raises(DataError, match=r"none\.txt: info |--input \S*/\*\.doc: "):
            find_files([f"{web.url}/{name}"])


def test_s3_is_read_with_the_credentials_of_the_environment(
    tmp_path: Path, corpus: Path, s3: FaultyServer
) -> None:
    make(tmp_path / "local", corpus)
    make(tmp_path / "remote", "s3://texts/in")
    assert content(tmp_path / "local") == content(tmp_path / "remote")
    make(tmp_path / "glob", "s3://texts/in/*/*.t?t*", "s3://texts/in/seven.parquet")
    make(tmp_path / "here", f"{corpus}/*/*.t?t*", f"{corpus}/seven.parquet")
    assert content(tmp_path / "here") == content(tmp_path / "glob")
    keys = [headers.get("Authorization", "") for headers in s3.headers]
    assert all("Credential=AKIDEXAMPLE/" in key for key in keys)


def test_a_dataset_of_the_hugging_face_hub(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub", reason=REASON)
    from fsspec.config import conf

    monkeypatch.setenv("HF_TOKEN", "hf_ofNobody")
    with serving(hub_upstream(corpus, "owner/name")) as hub:
        monkeypatch.setitem(conf, "hf", {"endpoint": hub.url})
        make(tmp_path / "local", corpus)
        make(tmp_path / "remote", "hf://datasets/owner/name")
        assert content(tmp_path / "local") == content(tmp_path / "remote")
        make(tmp_path / "here", f"{corpus}/*/*.jsonl", f"{corpus}/*.parquet")
        hub.faults[:] = ["500", "truncated", "short", "long", "503"]
        names = ("*/*.jsonl", "seven.parquet")
        make(tmp_path / "there", *(f"hf://datasets/owner/name/{name}" for name in names))
        assert content(tmp_path / "here") == content(tmp_path / "there")
        assert not hub.faults
        hub.ranges = False
        inputs_module._range.cache_clear()
        with pytest.raises(DataError, match=r"seven\.parquet: cat_file .*\(OSError: .*\bbytes\b"):
            make(tmp_path / "out", "hf://datasets/owner/name/seven.parquet")
        assert {"Bearer hf_ofNobody"} == {h["Authorization"] for h in hub.headers}


def test_a_bucket_of_google_cloud_storage(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else it asks what kind a bucket is by gRPC, which the server here does not speak.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs", reason=REASON)
    from fsspec.config import conf

    with serving(gcs_upstream(corpus)) as server:
        monkeypatch.setitem(conf, "gs", {"token": "anon", "endpoint_url": server.url})
        server.faults[:] = ["", "500", "truncated", "short", "long"]
        make(tmp_path / "local", corpus)
        make(tmp_path / "remote", "gs://b")
        assert content(tmp_path / "local") == content(tmp_path / "remote")
        assert not server.faults


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_after_any_fault_the_bytes_are_those_of_local_files(
    tmp_path: Path, corpus: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue("web" if kind == "http" else "s3")
    make(tmp_path / "local", corpus, tokenizer="bpe:300")
    server.faults[:] = [f for fault in FAULTS for f in ("", fault, "")]
    address = f"{server.url}/" if kind == "http" else "s3://texts/in"
    make(tmp_path / "remote", address, tokenizer="bpe:300")
    assert content(tmp_path / "local") == content(tmp_path / "remote")
    assert set(FAULTS) <= set(server.happened)
    assert not server.faults


@pytest.mark.parametrize(("kind", "name"), EACH_FORMAT)
def test_what_fails_for_good_is_an_error_and_then_done_again_is_whole(
    tmp_path: Path,
    corpus: Path,
    kind: str,
    name: str,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    server = request.getfixturevalue("web" if kind == "http" else "s3")
    inputs = [corpus / "five.md", corpus / name]
    make(tmp_path / "local", *inputs)
    address = f"{server.url}/{name}" if kind == "http" else f"s3://texts/in/{name}"
    command = [str(tmp_path / "out"), "--tokenizer", "bytes", "--val-fraction", "0.1"]
    command += ["--shard-tokens", "20000", "--input", str(inputs[0]), address]
    server.faults[:] = ["", *["500"] * 999]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert f"error: {address}: cat_file " in said
    assert re.search(r"\bnetwork\b.*\b5 ", said)
    assert not (tmp_path / "out").exists()
    server.faults.clear()
    assert main([*command, "--resume"]) == 0
    assert content(tmp_path / "local") == content(tmp_path / "out")


def test_a_run_that_broke_off_continues(
    tmp_path: Path,
    corpus: Path,
    web: FaultyServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(build, "BATCH_CHARS", 2000)
    monkeypatch.setattr(build, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(inputs_module, "HEAD_BYTES", 1 << 13)  # less than the files hold
    make(tmp_path / "local", corpus / "a/one.txt", corpus / "seven.parquet")
    command = [str(tmp_path / "out"), "--tokenizer", "bytes", "--val-fraction", "0.1"]
    command += ["--shard-tokens", "20000", "--workers", "1", "--resume", "--input"]

    def inputs(signature: str) -> list[str]:
        return [f"{web.url}/{name}?sig={signature}" for name in ("a/one.txt", "seven.parquet")]

    encoded, n_batches = build.encoded, 0

    def breaking(*arguments: object) -> Iterator[object]:
        nonlocal n_batches
        for result in encoded(*arguments):  # type: ignore[arg-type]
            n_batches += 1
            if n_batches == 1:  # the first file, whole
                web.fails_always = "seven"
                inputs_module._range.cache_clear()
            yield result

    with monkeypatch.context() as patched:
        patched.setattr(build, "encoded", breaking)
        assert main([*command, *inputs("first")]) == 2
    assert f"{web.url}/seven.parquet: cat_file " in capsys.readouterr().err
    assert '"batches"' in (progress := tmp_path / ".out.partial/progress.json").read_text()
    assert "sig" not in progress.read_text()
    web.fails_always = ""
    web.added_length = 1  # another file by now
    assert main([*command, *inputs("second")]) == 2
    assert f"file {web.url}/a/one.txt = [" in capsys.readouterr().err
    web.added_length = 0
    assert main([*command, *inputs("third")]) == 0  # signed anew, as an address that expires is
    assert re.search(r"(?m)^(Continu|Resum)ing .*\.partial", capsys.readouterr().out)
    assert content(tmp_path / "local") == content(tmp_path / "out")


@pytest.mark.parametrize("added", [-500, -1, 1])
@pytest.mark.parametrize(("kind", "name"), EACH_FORMAT)
def test_a_wrong_length_is_an_error(
    tmp_path: Path, kind: str, name: str, added: int, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue("web" if kind == "http" else "s3")
    server.added_length = added
    address = f"{server.url}/{name}" if kind == "http" else f"s3://texts/in/{name}"
    with pytest.raises(DataError) as error:
        make(tmp_path / "out", address)
    assert str(error.value).startswith(f"{address}: ")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_as_empty_as_was_said_is_an_error(
    tmp_path: Path, web: FaultyServer
) -> None:
    web.added_length = -len("short")
    with pytest.raises(DataError, match=r"five\.md: cat_file "):
        make(tmp_path / "out", f"{web.url}/five.md")


def test_a_file_that_is_replaced_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "in/a.txt"
    path.parent.mkdir()
    path.write_text("one line\n" * 50_000)
    with serving(folder_upstream(tmp_path / "in")) as server:
        source = Source(find_files([f"{server.url}/a.txt"]).files)
        assert len(list(source.documents())) == 1
        reading = source.documents()
        pieces = next(reading).pieces()
        next(pieces)
        path.write_text("two line\n" * 50_000)
        os.utime(path, (1, 1))
        list(pieces)
        with pytest.raises(DataError, match=r"a\.txt: .*\bchanged\b"):
            next(reading)


def test_files_are_recognised_by_what_they_hold_and_hidden_ones_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / ".git").mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(20, 4))
    (folder / "a.json").write_text(lines)
    (folder / "b").write_bytes(gzip.compress(lines.encode()))
    (folder / "c.txt").write_bytes("a plain text é\n".encode("utf-16"))
    for name in (".git/d.txt", ".e.txt"):
        (folder / name).write_text("hidden")
    make(tmp_path / "local", folder)
    with serving(folder_upstream(folder)) as server:
        notes = make(tmp_path / "remote", f"{server.url}/")
    assert " 3 files " in notes[0]
    assert re.search(r"\b2 hidden\b.*\.e\.txt, \.git\b", notes[0])
    assert content(tmp_path / "local") == content(tmp_path / "remote")


@pytest.mark.parametrize(
    ("kind", "pattern"), [("http", ""), ("http", "**/*.jsonl"), ("http", "*/*.*"), ("s3", "**/*.*")]
)
def test_a_folder_that_cannot_be_listed_is_an_error(
    kind: str, pattern: str, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue("web" if kind == "http" else "s3")
    server.fails_always = "a-b" if kind == "http" else "prefix=in%2Fa-b"
    address = f"{server.url}/{pattern}" if kind == "http" else f"s3://texts/in/{pattern}"
    with pytest.raises(DataError, match=r"a-b/: ls .*\bnetwork\b"):
        find_files([address])


def test_a_server_without_ranges_or_lengths_is_an_error(
    web: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.ranges = False
    make(tmp_path / "small", f"{web.url}/five.md", val_fraction=0.5)
    with pytest.raises(DataError, match=r"one\.txt: cat_file .*\bserver\b.*\d+.*download"):
        make(tmp_path / "out", f"{web.url}/a/one.txt")
    upstream = web.upstream

    def without_length(*arguments: object) -> object:
        status, headers, content = upstream(*arguments)  # type: ignore[arg-type]
        return status, headers | {"Content-Encoding": "gzip"}, content

    monkeypatch.setattr(web, "upstream", without_length)
    with pytest.raises(DataError, match=r"one\.txt: (?!cat_file).*\bserver\b.*download"):
        make(tmp_path / "out", f"{web.url}/a/one.txt")


def test_nothing_secret_is_said_or_kept(
    tmp_path: Path, web: FaultyServer, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"{web.url}/three.jsonl.gz?sig=sEcReT1&x=sEcReT2#sEcReT3".replace(
        "//", "//me:sEcReT4@"
    )
    command = ["--tokenizer", "bytes", "--input", address]
    assert main([str(tmp_path / "out"), *command]) == 0
    assert any("Basic" in headers.get("Authorization", "") for headers in web.headers)  # used it
    web.fails_always = "three"
    inputs_module._range.cache_clear()
    for wrong in (address, address.replace("three", "none"), address.replace("three", "*x*")):
        assert main([str(tmp_path / "no"), *command[:-1], wrong]) == 2
    said = capsys.readouterr()
    kept = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert "/three.jsonl.gz" in said.err
    assert b"/three.jsonl.gz" in kept
    assert "sEcReT" not in said.out + said.err
    assert b"sEcReT" not in kept


def test_parts_of_remote_text_are_what_one_run_of_local_text_makes(
    tmp_path: Path, corpus: Path, web: FaultyServer
) -> None:
    make(tmp_path / "local", corpus, tokenizer="bpe:300")
    for number in (3, 1, 2):
        make(tmp_path / "out", f"{web.url}/", tokenizer="bpe:300", shard_of=f"{number}/3")
    merge(tmp_path / "out", note=lambda line: None)
    assert content(tmp_path / "local") == content(tmp_path / "out")


def failing(server: FaultyServer, name: str, times: float, *, late: bool = False) -> list[str]:
    """Answer 500 to so many uploads of a file, before or after it is stored; return their paths."""
    upstream, failed = server.upstream, list[str]()

    def answer(method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        fails = method == "PUT" and name in target and len(failed) < times
        found = (500, {}, b"") if fails and not late else upstream(method, target, headers, body)
        if fails:
            failed.append(target)
        return (500, {}, b"") if fails else found

    server.upstream = answer
    return failed


def test_parts_are_made_and_merged_in_a_bucket(
    tmp_path: Path, corpus: Path, s3: FaultyServer, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "whole", corpus, tokenizer="bpe:300")
    out = "s3://texts/made/corpus"
    command = [out, "--tokenizer", "bpe:300", "--val-fraction", "0.1"]
    command += ["--shard-tokens", "20000", "--input", str(corpus), "--shard-of"]
    first = "s3://texts/made/corpus.parts/1-of-3"
    refused = failing(s3, "3-of-3/train_000000.bin", files.ATTEMPTS - 1)
    lost = failing(s3, "2-of-3/dataset.json", 2, late=True)
    for number in (3, 2):
        assert main([*command, f"{number}/3"]) == 0
    assert (len(refused), len(lost)) == (files.ATTEMPTS - 1, 2)
    assert "--merge" in capsys.readouterr().out
    failed = failing(s3, "1-of-3/train_000000.ends", files.ATTEMPTS)
    assert main([*command, "1/3"]) == 2
    assert len(failed) == files.ATTEMPTS
    said = capsys.readouterr().err
    assert f"error: {first}/train_000000.ends: put_file " in said
    assert re.search(r"\b5 .*--resume ", said)
    assert main([out, "--merge"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"corpus\.parts: .*\b2-of-3, 3-of-3\b.*\b1-of-N\b", said)
    assert main([*command, "1/3"]) == 2
    assert re.search(rf"{first}: .*\bexists\b.*--resume", capsys.readouterr().err)
    before = len(s3.requests)
    assert main([*command, "1/3", "--resume"]) == 0
    sent = [path.rpartition("/")[2] for method, path in s3.requests[before:] if method == "PUT"]
    assert sent[0] == "train_000000.ends", "what was there is not sent again"
    assert sent[-1] == "dataset.json"
    assert main([*command, "1/3", "--resume"]) == 0
    assert re.search(rf"{first}\b.*\bcomplete\b", capsys.readouterr().out)
    assert main([*command, "1/3"]) == 2
    assert re.search(rf"{first}: .*\bexists\b.*\bdataset\b", capsys.readouterr().err)
    assert main([*command, "1/3", "--text-field", "x", "--resume"]) == 2
    said = capsys.readouterr().err
    assert re.search(rf"{first}: .*\bdataset\b.*text_field = 'text'.*'x'", said)
    assert main([out, "--merge"]) == 0
    assert f"python -m fasttrain.train base data.path={out}" in capsys.readouterr().out
    for path in (tmp_path / "whole").iterdir():
        assert files.remote(f"{out}/{path.name}", "cat_file") == path.read_bytes(), path.name
    assert files.names_at(out).keys() == {path.name for path in (tmp_path / "whole").iterdir()}
    there, here = (open_dataset(at, "train") for at in (out, tmp_path / "whole"))
    assert there.read(0, there.n_tokens).tolist() == here.read(0, here.n_tokens).tolist()
    left = tmp_path / "cache/fasttrain/prepare"
    assert not [path for path in left.rglob("*") if path.is_file()]


def test_a_copy_goes_only_where_it_may(
    tmp_path: Path, corpus: Path, web: FaultyServer, s3: FaultyServer
) -> None:
    with pytest.raises(DataError, match=r"/out: .*\bfolder\b.*\bbucket\b"):
        make(f"{web.url}/out", corpus)  # type: ignore[arg-type]
    files.put("s3://texts/taken/mine.txt", b"mine")
    out: Any = "s3://texts/taken"
    with pytest.raises(DataError, match=r"/taken: .*\bexists\b.*--resume"):
        make(out, corpus)
    with pytest.raises(DataError, match=r"/taken: .*\bremove\b.*--resume"):
        make(out, corpus, resume=True)
    assert files.names_at("s3://texts/taken") == {"mine.txt": 4}
    with pytest.raises(DataError, match=r"no-such-bucket/x/prepared\.json: put_file "):
        make("s3://no-such-bucket/x", corpus)  # type: ignore[arg-type]


READ = """
import re, sys
from pathlib import Path
from fasttrain.prepare.inputs import find_files
from fasttrain.prepare.sources import Source
from fasttrain.prepare.sources import Source
files, _ = find_files(sys.argv[1:])
n = sum(len(piece) for document in Source(files).documents() for piece in document.pieces())
print(n, re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.txt.gz"])
def test_memory_stays_flat(tmp_path: Path, name: str) -> None:
    peaks = []
    line = json.dumps({"text": "0123456789 " * 90}) + "\n" if "jsonl" in name else "a line\n" * 200
    for megabytes in (20, 100):
        text = line.encode() * (megabytes * 1_000_000 // len(line))
        (tmp_path / name).write_bytes(gzip.compress(text, 0) if name.endswith("gz") else text)
        with serving(folder_upstream(tmp_path)) as server:
            command = [sys.executable, "-c", READ, f"{server.url}/{name}"]
            result = subprocess.run(
                command, capture_output=True, text=True, timeout=300,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )  # fmt: skip
        assert result.returncode == 0, result.stderr
        n_chars, peak = map(int, result.stdout.split())
        assert n_chars >= 0.9 * megabytes * 1_000_000
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 40_000  # KiB, of 80 MB more
