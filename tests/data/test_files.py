"""Addresses: read whole or refused, with nothing secret in what is said of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fasttrain import storage as files
from fasttrain.storage import DataError, read_range, remote, shown
from tests.support.faulty_server import FAULTS, FaultyServer, folder_upstream, serving

pytest.importorskip("aiohttp", reason="needs the extra remote")
CONTENT = bytes(range(256)) * 40


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    (tmp_path / "a.bin").write_bytes(CONTENT)
    (tmp_path / "empty").touch()
    monkeypatch.setattr(files, "PAUSE_S", 0.01)
    with serving(folder_upstream(tmp_path)) as server:
        yield server


@pytest.mark.parametrize("fault", FAULTS)
def test_a_range_is_whole_after_any_fault_or_an_error_says_why(
    server: FaultyServer, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "stall":
        monkeypatch.setattr(files, "STALL_S", 1.0)
        server.stall_s = 2.0
    address = f"{server.url}/a.bin?sig=hidden"
    size = remote(address, "info")["size"]
    assert size == len(CONTENT)
    server.faults[:] = [fault] * 2
    assert read_range(address, 0, size, size) == CONTENT
    assert read_range(address, 100, 9000, size) == CONTENT[100:9000]
    assert server.happened == [fault] * 2
    server.faults[:] = [fault] * 99
    with pytest.raises(DataError, match=r"/a\.bin: cat_file .*\bnetwork\b.*\b5 ") as e:
        read_range(address, 0, size, size)
    assert len(server.happened) >= 2 + files.ATTEMPTS  # aiohttp itself connects anew if need be
    assert "hidden" not in str(e.value)


@pytest.mark.parametrize("added", [-5000, -1, 1, 3])
def test_a_length_that_the_server_says_wrong_is_an_error(server: FaultyServer, added: int) -> None:
    server.added_length = added
    size = remote(f"{server.url}/a.bin", "info")["size"]
    assert size == len(CONTENT) + added
    with pytest.raises(DataError, match=rf"/a\.bin: .*\bbytes 0\b.*\b{size}\b.* \d+"):
        read_range(f"{server.url}/a.bin", 0, size, size)


def test_an_empty_file_is_one_only_if_nothing_comes(server: FaultyServer) -> None:
    assert read_range(f"{server.url}/empty", 0, 0, 0) == b""
    with pytest.raises(DataError, match=rf"/a\.bin: .*\b{len(CONTENT)}\b.*download"):
        read_range(f"{server.url}/a.bin", 0, 0, 0)


def test_a_server_without_ranges_is_not_asked_for_whole_files(server: FaultyServer) -> None:
    server.ranges = False
    size = len(CONTENT)
    assert read_range(f"{server.url}/a.bin", 0, size, size) == CONTENT
    with pytest.raises(DataError, match=r"/a\.bin: .*\bbytes 0\b.*\b100\b.*\b10240\b.*download"):
        read_range(f"{server.url}/a.bin", 0, 100, size)


def test_what_is_not_there_is_asked_for_once_and_what_fails_often(server: FaultyServer) -> None:
    with pytest.raises(DataError, match=r"/none: info .*\baddress\b.*\bcredentials\b"):
        remote(f"{server.url}/none", "info")
    assert [method for method, _ in server.requests] == ["HEAD", "GET"]
    server.requests.clear()
    server.fails_always = "a.bin"
    with pytest.raises(
        DataError, match=r"/a\.bin: info .*\(ClientResponseError: 500.*\bnetwork\b.*\b5 "
    ):
        remote(f"{server.url}/a.bin", "info")
    assert len(server.requests) == 2 * files.ATTEMPTS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:secret@host/a/b.txt?sig=secret&x=1#secret", "https://host/a/b.txt"),
        ("403, url='https://cdn/x?Signature=secret', more", "403, url='https://cdn/x more"),
        ("s3://key:secret@bucket/part-*.txt", "s3://bucket/part-*.txt"),
        ("s3://key:se/cret@bucket/a", "s3://bucket/a"),
        ("https://host:80/a@b", "https://host:80/a@b"),
        ("hf://datasets/o/n@rev/x.parquet", "hf://datasets/o/n@rev/x.parquet"),
        ("/a/local@path?x", "/a/local@path?x"),
    ],
)
def test_what_is_shown_of_addresses_has_no_secrets(text: str, expected: str) -> None:
    assert shown(text) == expected


def test_unknown_and_uninstalled_file_systems_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"^what://a/b: .*\(Protocol not known: what"):
        remote("what://a/b?k=v", "info")

    def missing(name: str) -> None:
        raise ImportError("Install it")

    monkeypatch.setattr(files.importlib, "import_module", missing)
    for address, package in (("s3://a/b", "s3fs"), ("https://a/b", "aiohttp")):
        with pytest.raises(
            DataError, match=rf"^{address}: .*pip install {package}\b.*\(Install it"
        ):
            remote(address, "info")
