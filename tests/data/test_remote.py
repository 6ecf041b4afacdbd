"""Shards at an address: the batches of the disk, a bounded cache, and faults on the way."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from fasttrain import storage as files
from fasttrain.config import load_config
from fasttrain.data import loader, remote
from fasttrain.data.dataset import Shard, TokenDataset, join
from fasttrain.data.format import absent, open_dataset, write_dataset_json
from fasttrain.data.loader import Batch, Loader
from fasttrain.data.order import LoaderOptions
from fasttrain.data.remote import ShardCache, beside, n_bytes
from fasttrain.engine.run_size import RunSize, warnings_at_start
from fasttrain.prepare.writer import ShardWriter
from fasttrain.storage import DataError
from tests.support.faulty_server import (
    FAULTS,
    FaultyServer,
    folder_upstream,
    proxy_upstream,
    serving,
)
from tests.support.toy import ENV

pytest.importorskip("aiohttp", reason="needs the extra remote")
N_SHARDS, SHARD_TOKENS = 8, 64
SHARD_BYTES = 1024 + 2 * SHARD_TOKENS
GIB = 2**30
ROOMY = 1.0


def write(folder: Path, *, vocab: int = 100, largest: int = 100) -> Path:
    """Write a dataset of eight training shards and two to validate on, of short documents."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text('{"a": "tokenizer"}')
    rng, splits = np.random.default_rng(1), {}
    for split, n in (("train", N_SHARDS * SHARD_TOKENS), ("val", 2 * SHARD_TOKENS)):
        tokens = rng.integers(0, largest, n)
        with closing(
            ShardWriter(folder, split, vocab_size=vocab, shard_tokens=SHARD_TOKENS)
        ) as writer:
            for start in range(0, n, 16):
                writer.write(tokens[start : start + 16], [5, 16])
        splits[split] = (writer.shards, n)
    write_dataset_json(folder, vocab_size=vocab, end_of_text=0, splits=splits, source={})
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "served" / "data")


@pytest.fixture
def server(data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setattr(files, "PAUSE_S", 0.01)
    monkeypatch.setattr(files, "STALL_S", 2.0)
    with serving(folder_upstream(data.parent)) as server:
        server.stall_s = 2.5
        yield server


def fetched(server: FaultyServer) -> Counter[str]:
    """How often each shard was asked for."""
    names = [path.rpartition("/")[2] for method, path in server.requests if method == "GET"]
    return Counter(name for name in names if name.endswith(".bin"))


def opened(server: FaultyServer, cache: Path, *, gib: float = ROOMY) -> TokenDataset:
    given: dict[str, Any] = {"cache_dir": cache, "shard_cache": ShardCache(cache, gib)}
    return open_dataset(f"{server.url}/data", "train", **given)


def parts(cache: Path) -> list[Path]:
    """What is left of fetching, once the threads that fetch ahead have ended."""
    deadline = time.monotonic() + 60
    while any(thread.name == "fasttrain-fetch" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return list((cache / "shards").glob("*.part"))


def batches(dataset: TokenDataset, n: int = 24, position: int = 0, **options: Any) -> list[Batch]:
    given = {"seq_len": 15, "micro_batch": 2, "seed": 3, "prefetch": 4} | options
    with Loader(dataset, LoaderOptions(**given), device="cpu", position=position) as found:
        return [next(found) for _ in range(n)]


def assert_equal(one: list[Batch], two: list[Batch]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.position == b.position
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.targets, b.targets)
        assert (a.doc_starts is None) == (b.doc_starts is None)
        assert a.doc_starts is None or torch.equal(a.doc_starts, b.doc_starts)


def watch_size(server: FaultyServer, folder: Path) -> list[int]:
    """Bytes in a folder at each request."""
    sizes, upstream = [], server.upstream

    def answer(*request: Any) -> Any:
        total = 0
        for path in folder.glob("shards/*"):
            try:
                total += path.stat().st_size
            except FileNotFoundError:  # evicted meanwhile
                continue
        sizes.append(total)
        return upstream(*request)

    server.upstream = answer
    return sizes


CASES: dict[str, dict[str, Any]] = {
    "packed": {},
    "sliding": {"batching": "sliding", "stride_tokens": 4},
    "bucketed": {"batching": "bucketed"},
    "marked": {"separate_documents": True},
    "ranks": {"rank": 1, "world_size": 2, "prefetch": 1},
    "long": {"seq_len": 100},  # over three shards
}


@pytest.mark.parametrize(
    ("name", "n_files"), [*((name, 2) for name in CASES), ("packed", 1), ("packed", 100)]
)
def test_batches_are_those_from_disk_within_the_bound(
    data: Path, tmp_path: Path, server: FaultyServer, name: str, n_files: int
) -> None:
    """More than an epoch of them, also where the cache holds one file."""
    options = {"prefetch": 8} | CASES[name]
    local = open_dataset(data, "train", cache_dir=tmp_path / "local")
    limit = n_files * SHARD_BYTES
    sizes = watch_size(server, tmp_path / "cache")
    there = opened(server, tmp_path / "cache", gib=limit / GIB)
    assert there.facts == local.facts
    assert (there.n_tokens, there.n_documents, there.end_of_text) == (512, 64, 0)
    assert there.tokenizer_path is not None
    assert there.tokenizer_path.read_bytes() == (data / "tokenizer.json").read_bytes()
    assert_equal(batches(there, **options), batches(local, **options))
    assert SHARD_BYTES <= max(sizes) <= limit
    if n_files == 100:
        assert set(fetched(server).values()) == {1}
    else:
        assert len(list((tmp_path / "cache/shards").glob("*.bin"))) <= n_files
    assert parts(tmp_path / "cache") == []


def test_a_loader_continues_at_any_position_from_either(
    data: Path, tmp_path: Path, server: FaultyServer
) -> None:
    local = open_dataset(data, "train", cache_dir=tmp_path / "local")
    there = opened(server, tmp_path / "cache", gib=3 * SHARD_BYTES / GIB)
    whole = batches(local, 40)
    for at in (1, 17, 39):
        assert_equal(batches(there, 40 - at, whole[at - 1].position), whole[at:])


def test_mixed_datasets_may_be_here_and_there(
    data: Path, tmp_path: Path, server: FaultyServer
) -> None:
    local = open_dataset(data, "train", cache_dir=tmp_path / "local")
    there = opened(server, tmp_path / "cache", gib=2 * SHARD_BYTES / GIB)
    expected = batches(join([local, local]), weights=[0.25, 0.75])
    assert_equal(batches(join([local, there]), weights=[0.25, 0.75]), expected)
    assert_equal(batches(join([there, there]), weights=[0.25, 0.75]), expected)


def test_a_warm_cache_costs_what_the_disk_costs(
    data: Path, tmp_path: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return real(*args, **options)

        monkeypatch.setattr(owner, name, counted)

    there = opened(server, tmp_path / "cache")
    local = open_dataset(data, "train", cache_dir=tmp_path / "local")
    batches(there)
    before = len(server.requests)
    for owner, name in ((os, "preadv"), (Shard, "scan"), (threading.Thread, "start")):
        count(owner, name)
    batches(local, epochs=48 / 34)
    of_disk, _ = dict(calls), calls.clear()
    batches(there, epochs=48 / 34)
    assert calls == of_disk, "nothing is hashed or fetched again"
    assert calls["preadv"] >= 48
    assert len(server.requests) == before
    # Another process finds it warm too.
    again = opened(server, tmp_path / "cache")
    batches(again)
    assert fetched(server).total() == N_SHARDS


def test_shards_are_fetched_ahead_in_the_order_of_their_use(
    data: Path, tmp_path: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the ring is full: nobody has asked for a batch yet."""
    monkeypatch.setattr(remote, "FETCHERS", 1)
    there = opened(server, tmp_path / "cache")
    options = LoaderOptions(seq_len=15, micro_batch=1, seed=3, prefetch=1)
    with Loader(there, options, device="cpu") as found:
        starts, _ = found.order.rows(0, 1 + loader.AHEAD)
        order = [f"train_{n // SHARD_TOKENS:06d}.bin" for s in starts for n in (s, s + 15)]
        expected = list(dict.fromkeys(order))
        assert len(expected) > 5
        deadline = time.monotonic() + 60
        while len(fetched(server)) < len(expected):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert list(fetched(server)) == expected


def test_what_was_fetched_ahead_stays_until_it_was_read(
    data: Path, tmp_path: Path, server: FaultyServer
) -> None:
    """A pass over all shards fetches each once, however small the cache."""
    there = opened(server, tmp_path / "cache", gib=3 * SHARD_BYTES / GIB)
    batches(there, 68, micro_batch=1, prefetch=68, epochs=2)
    assert set(fetched(server)) == {f"train_{n:06d}.bin" for n in range(N_SHARDS)}
    assert max(fetched(server).values()) <= 2, "two halves of the ring, two passes"


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_transit_change_nothing(
    data: Path, tmp_path: Path, server: FaultyServer, fault: str
) -> None:
    local = open_dataset(data, "train", cache_dir=tmp_path / "local")
    there = opened(server, tmp_path / "cache", gib=3 * SHARD_BYTES / GIB)
    server.faults[:] = [fault] * 3
    assert_equal(batches(there, 20), batches(local, 20))
    assert server.happened == [fault] * 3


def flip(server: FaultyServer, name: str, times: float) -> None:
    """Send one byte of a file wrongly, so many times."""
    upstream, left = server.upstream, times

    def answer(method: str, target: str, headers: Any, body: bytes) -> Any:
        nonlocal left
        status, told, content = upstream(method, target, headers, body)
        if target.endswith(name) and method == "GET" and left > 0:
            left -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        return status, told, content

    server.upstream = answer


def test_wrong_bytes_are_fetched_again_or_refused(
    data: Path, tmp_path: Path, server: FaultyServer
) -> None:
    local = open_dataset(data, "train", cache_dir=tmp_path / "local")
    flip(server, "train_000003.bin", 2)
    assert_equal(batches(opened(server, tmp_path / "a")), batches(local))
    assert fetched(server)["train_000003.bin"] == 3
    flip(server, "train_000003.bin", float("inf"))
    there = opened(server, tmp_path / "b")
    with pytest.raises(
        DataError,
        match=rf"{server.url}/data/train_000003\.bin: .*SHA-256.* [0-9a-f]{{16}}….*dataset\.json\b"
        r".* [0-9a-f]{16}….*\b64 tokens\b.*\buint16\b",
    ):
        batches(there)
    assert parts(tmp_path / "b") == []
    flip(server, "train_000000.ends", float("inf"))
    match = rf": .*\bends\b.* {server.url}/data/train_000000\.bin\b"
    with pytest.raises(DataError, match=match):
        _ = opened(server, tmp_path / "c").document_ends


def test_a_file_damaged_in_the_cache_is_fetched_again(
    data: Path, tmp_path: Path, server: FaultyServer
) -> None:
    local, cache = open_dataset(data, "train", cache_dir=tmp_path / "local"), tmp_path / "cache"
    there = opened(server, cache)
    expected = batches(local)
    assert_equal(batches(there), expected)
    damaged = sorted((cache / "shards").glob("*.bin"))[:3]
    damaged[0].write_bytes(damaged[0].read_bytes()[:-2])
    damaged[1].write_bytes(bytes(SHARD_BYTES))
    content = bytearray(damaged[2].read_bytes())
    content[-1] ^= 1
    damaged[2].write_bytes(content)
    assert_equal(batches(there), expected)
    assert fetched(server).total() == N_SHARDS + 3


def test_a_file_may_be_evicted_while_it_is_read(
    data: Path, tmp_path: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = opened(server, tmp_path / "cache")
    first, expected = there.shards[0].file.path, there.read(0, 5).tolist()
    read = Shard.read

    def evicted(shard: Shard, pieces: Iterable[tuple[int, memoryview]]) -> None:
        first.unlink()
        monkeypatch.undo()
        read(shard, pieces)

    monkeypatch.setattr(Shard, "read", evicted)
    assert there.read(0, 5).tolist() == expected, "it is open"
    assert not first.exists()
    assert there.read(0, 5).tolist() == expected, "it is fetched again"


def test_R22_tokens_outside_the_vocabulary_are_refused(
    tmp_path: Path, server: FaultyServer
) -> None:
    folder = write(tmp_path / "served" / "large", largest=90)
    meta = json.loads((folder / "dataset.json").read_text())
    meta["vocab_size"] = 80
    (folder / "dataset.json").write_text(json.dumps(meta))
    cache = ShardCache(tmp_path / "cache", ROOMY)
    there = open_dataset(f"{server.url}/large", "train", cache_dir=tmp_path, shard_cache=cache)
    with pytest.raises(
        DataError, match=r"train_00000\d\.bin: .*\b8\d\b.*\b\d+\b.*\bvocabulary\b.*\b80\b"
    ):
        batches(there)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.update(sha256="../../../../tmp/x"), r"'[./]+tmp/x'.*SHA-256"),
        (lambda e: e.update(ends_sha256="A" * 64), "'A{64}'.*SHA-256"),
        (lambda e: e.update(tokens=10**12), r"data\.cache_gib = 1 "),
        (lambda e: e.update(documents=10**12), r"data\.cache_gib = 1 "),
        (lambda e: e.update(file="../secret.bin"), r"dataset\.json: .*'\.\./secret\.bin'"),
        (lambda e: e.update(tokens=63), r"\bbytes 0\b.*\b1150\b|SHA-256"),
    ],
)
def test_R25_a_hostile_description_is_refused(
    data: Path,
    tmp_path: Path,
    server: FaultyServer,
    change: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    meta = json.loads((data / "dataset.json").read_text())
    change(meta["splits"]["train"]["shards"][0])
    (data / "dataset.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match=message):
        batches(opened(server, tmp_path / "cache"))
    assert not list(tmp_path.rglob("secret*"))


def test_the_description_and_the_split_must_be_there(tmp_path: Path, server: FaultyServer) -> None:
    with pytest.raises(DataError, match=rf"{server.url}/none/dataset\.json: .*\baddress\b"):
        open_dataset(f"{server.url}/none", "train", cache_dir=tmp_path)
    meta = json.loads((tmp_path / "served/data/dataset.json").read_text())
    del meta["splits"]["val"]
    (tmp_path / "served/data/dataset.json").write_text(json.dumps(meta))
    with pytest.raises(
        DataError, match=r"/remote/http/.*/data/dataset\.json: .*'val'.*--val-fraction"
    ):
        open_dataset(f"{server.url}/data?token=hidden", "val", cache_dir=tmp_path)
    assert ("GET", "/data/dataset.json?token=hidden") in server.requests


def test_a_cache_that_is_too_small_says_what_would_do(
    data: Path, tmp_path: Path, server: FaultyServer
) -> None:
    with pytest.raises(DataError, match=r"data\.cache_gib = 1e-06\b.*\b0\.001$"):
        opened(server, tmp_path / "cache", gib=1e-6)
    train = opened(server, tmp_path / "cache", gib=5 * SHARD_BYTES / GIB)
    assert n_bytes(train.shards) == N_SHARDS * SHARD_BYTES + 64, "documents end alike in all"
    config = load_config("base", [f"data.cache_gib={5 * SHARD_BYTES / GIB}"])
    plan = RunSize(config, cast(Any, None), None, None, 1)
    plan.train = train
    warnings = [w for w in warnings_at_start(plan) if "cache_gib" in w]
    told = r"\b8 micro-batches\b.*\b0\.001 GiB\b.*\b0\.001\b.*\bdata\.prefetch\b"
    assert re.search(told, warnings[0])
    config = load_config("base", ["data.cache_gib=0.001"])
    plan.config = config
    assert not [w for w in warnings_at_start(plan) if "cache_gib" in w]


def test_files_of_other_datasets_and_killed_processes_make_room(
    data: Path, tmp_path: Path, server: FaultyServer
) -> None:
    cache = tmp_path / "cache"
    (cache / "shards").mkdir(parents=True)
    (cache / "shards/lock-ab").touch()
    for n, (suffix, age) in enumerate([("bin", 9e5), ("part", 1.0), ("bin", 10.0)]):
        path = cache / f"shards/{hashlib.sha256(bytes([n])).hexdigest()}.{suffix}"
        path.write_bytes(bytes(SHARD_BYTES))
        os.utime(path, (time.time() - age,) * 2)
    there = opened(server, cache, gib=3.5 * SHARD_BYTES / GIB)
    there.read(0, 5)
    there.read(SHARD_TOKENS, 5)
    left = {p.name for p in (cache / "shards").glob("*.*")}
    assert left == {there.shards[0].file.path.name, there.shards[1].file.path.name, path.name}, (
        "the newest"
    )
    assert (cache / "shards/lock-ab").exists()


SCRIPT = """
import sys
from fasttrain.data.format import open_dataset
from fasttrain.data.remote import ShardCache
from pathlib import Path
address, cache, limit = sys.argv[1:]
shard_cache = ShardCache(Path(cache), int(limit) / 2**30)
dataset = open_dataset(address, "train", cache_dir=Path(cache), shard_cache=shard_cache)
for _ in range(3):
    shard_cache.fetch_ahead(dataset.shards)
    total = int(dataset.read(0, dataset.n_tokens).sum())
print(total)
"""


@pytest.mark.parametrize("n_files", [2, 100])
def test_processes_share_a_cache(
    data: Path, tmp_path: Path, server: FaultyServer, n_files: int
) -> None:
    expected = int(open_dataset(data, "train", cache_dir=tmp_path).read(0, 512).sum())
    sizes = watch_size(server, tmp_path / "cache")
    command = [sys.executable, "-c", SCRIPT, f"{server.url}/data", tmp_path / "cache"]
    running = [
        subprocess.Popen(
            [*command, str(n_files * SHARD_BYTES)], env=ENV, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    assert [int(process.communicate(timeout=120)[0]) for process in running] == [expected] * 3
    assert max(sizes) <= n_files * SHARD_BYTES
    if n_files == 100:
        assert fetched(server) == {f"train_{n:06d}.bin": 1 for n in range(N_SHARDS)}


def test_R9_a_slow_network_does_not_hang_and_a_silent_one_is_named(
    data: Path, tmp_path: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "DEADLINE_S", 0.4)
    monkeypatch.setattr(remote, "RANGE_BYTES", 128)
    monkeypatch.setattr(remote, "FETCHERS", 1)
    upstream = server.upstream
    wait = threading.Event()
    delay_s = 0.1

    def slow(*request: Any) -> Any:
        wait.wait(delay_s)
        return upstream(*request)

    server.upstream = slow
    there = opened(server, tmp_path / "a")
    began = time.monotonic()
    batches(there, 1, micro_batch=1, prefetch=1)
    assert time.monotonic() - began > 0.9, "nine pieces"
    there = opened(server, tmp_path / "b")
    delay_s = 30.0
    with pytest.raises(DataError, match=r"^http:/127.*/data/train_\d+\.bin: .*\b0\.4 s\b"):
        batches(there, 1, micro_batch=1, prefetch=1)
    wait.set()


def test_a_missing_shard_is_an_error_that_names_it(
    data: Path, tmp_path: Path, server: FaultyServer
) -> None:
    there = opened(server, tmp_path / "cache")
    (data / "train_000005.bin").unlink()
    with pytest.raises(DataError, match=rf"{server.url}/data/train_000005\.bin: .*\baddress\b"):
        batches(there)


def test_shards_in_a_bucket(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3, with faults between it and us."""
    moto = pytest.importorskip("moto.server", reason="needs moto[s3,server]")
    s3fs = pytest.importorskip("s3fs", reason="needs the extra remote")
    boto3 = pytest.importorskip("boto3", reason="needs moto[s3,server]")
    monkeypatch.setattr(files, "PAUSE_S", 0.01)
    monkeypatch.setattr(files, "STALL_S", 2.0)
    for name, value in (("ACCESS_KEY_ID", "user"), ("SECRET_ACCESS_KEY", "s3cret-of-the-user")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3 = moto.ThreadedMotoServer(port=0)
    s3.start()
    try:
        _, port = s3.get_host_and_port()
        with serving(proxy_upstream(port)) as server:
            monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
            s3fs.S3FileSystem.clear_instance_cache()
            client = boto3.client("s3")
            client.create_bucket(Bucket="texts")
            for path in data.iterdir():
                client.put_object(Bucket="texts", Key=f"a/{path.name}", Body=path.read_bytes())
            cache = ShardCache(tmp_path / "cache", 3 * SHARD_BYTES / GIB)
            options: dict[str, Any] = {"cache_dir": tmp_path, "shard_cache": cache}
            there = open_dataset("s3://texts/a/", "train", **options)
            server.faults[:] = ["500", "truncated", "short", "reset", "503"]
            local = open_dataset(data, "train", cache_dir=tmp_path / "local")
            assert_equal(batches(there), batches(local))
            assert len(server.happened) == 5
            client.delete_object(Bucket="texts", Key="a/train_000002.bin")
            there = open_dataset(
                "s3://texts/a",
                "train",
                cache_dir=tmp_path,
                shard_cache=ShardCache(tmp_path / "b", 1),
            )
            with pytest.raises(DataError, match=r"^s3://texts/a/train_000002\.bin: ") as error:
                batches(there)
            assert "s3cret" not in str(error.value)
    finally:
        s3.stop()
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_folder_that_cannot_be_written_is_named(
    data: Path, tmp_path: Path, server: FaultyServer
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/shards").touch()
    there = opened(server, tmp_path / "cache")
    with pytest.raises(DataError, match=r"/cache/shards: File exists\b.*\bdata\.cache_dir\b"):
        batches(there)


def test_addresses_of_files_beside() -> None:
    assert absent("s3://a/b", None) is None
    assert beside("s3://a/b/", "c.bin") == "s3://a/b/c.bin"
    assert beside("https://a/b?sig=x/y", "c.bin") == "https://a/b/c.bin?sig=x/y"
