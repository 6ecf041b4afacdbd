"""Text at addresses gives the bytes that local files give, or an error, never a short dataset."""

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from fasttrain.data import files
from fasttrain.data.prepare import remote
from fasttrain.data.prepare.sources import find_files
from fasttrain.prepare import prepare
from tests.support.faulty_server import (
    FaultyServer,
    folder_upstream,
    proxy_upstream,
    serving,
)

REASON = "needs pip install 'fasttrain[remote]'"
pytest.importorskip("aiohttp", reason=REASON)
pytest.importorskip("fsspec", reason=REASON)
RANGE_BYTES = 5000  # fetched at once here


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "PAUSE_S", 0.01)
    monkeypatch.setattr(files, "STALL_S", 1.0)
    monkeypatch.setattr(remote, "RANGE_BYTES", RANGE_BYTES)
    yield
    remote._range.cache_clear()  # the next test's server may have the same port


def texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [f"{n}: " + "word 12 日本 é\n" * rng.randint(1, 40) for n in range(count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a file of each format, in an order that names and folders make."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(40, 0))
    (folder / "a-b").mkdir()
    (folder / "a").mkdir()
    (folder / "a/one.txt").write_text("".join(texts(30, 1)))
    (folder / "a-b/two.jsonl").write_text(lines)
    (folder / "three.jsonl.gz").write_bytes(gzip.compress(lines[::-1][::-1].encode(), mtime=0))
    (folder / "five.md").write_text("short")
    (folder / "picture.png").write_bytes(b"no text")
    if zstandard := pytest.importorskip("zstandard", reason="needs the extra data"):
        packed = zstandard.ZstdCompressor().compress("".join(texts(60, 2)).encode())
        (folder / "a/six.txt.zst").write_bytes(packed)
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra data")
    table = pytest.importorskip("pyarrow").table({"n": list(range(300)), "text": texts(300, 3)})
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
    assert "Skipped 1 file with an unknown ending: picture.png" in notes
    assert content(tmp_path / "local") == content(tmp_path / "remote")
    for pattern in ("**/*.txt", "*/*.*", "*.parquet", "a*/*.jsonl", "**/*[!g]"):
        here, _ = find_files([f"{corpus}/{pattern}"])
        there, _ = find_files([f"{web.url}/{pattern}"])
        names = [str(file).removeprefix(f"{web.url}/") for file in there]
        assert names == [str(file.relative_to(corpus)) for file in here], pattern  # type: ignore


def test_s3(tmp_path: Path, corpus: Path, s3: FaultyServer) -> None:
    make(tmp_path / "local", corpus)
    make(tmp_path / "remote", "s3://texts/in")
    assert content(tmp_path / "local") == content(tmp_path / "remote")
