"""A local HTTP server of a folder, or in front of an S3 server, that fails as networks do."""

import contextlib
import hashlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

# Status, headers and body of an answer.
Answer = tuple[int, dict[str, str], bytes]
Upstream = Callable[[str, str, dict[str, str], bytes], Answer]
# What can become of an answer.
FAULTS = ("500", "503", "stall", "truncated", "reset", "short", "long")


class FaultyServer(ThreadingHTTPServer):
    """Answers as `upstream` does; the faults in `faults` happen to the next ranges of bytes."""

    daemon_threads = True

    def __init__(self, upstream: Upstream) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.faults, self.stall_s = upstream, list[str](), 5.0
        self.requests: list[tuple[str, str]] = []  # method, and path with its query
        self.happened: list[str] = []
        self.added_length = 0  # to what HEAD says
        self.ranges = True  # whether parts of a file are sent
        self.fails_always: str = ""  # a part of the paths that get 500
        self.headers: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        server, fault = self.server, ""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        sent = {name.title(): value for name, value in self.headers.items()}
        server.requests.append((self.command, self.path))
        server.headers.append(sent)
        if not server.ranges:
            sent.pop("Range", None)
        if self.command == "GET" and "Range" in self.headers and server.faults:
            server.happened.append(fault := server.faults.pop(0))
        status, headers, content = server.upstream(self.command, self.path, sent, body)
        if fault in ("500", "503") or (server.fails_always and server.fails_always in self.path):
            status, headers, content = int(fault or 500), {}, b"sorry"
        length = headers.pop("Content-Length", len(content))
        if self.command == "HEAD" and status == 200:
            length = int(length) + server.added_length
        half = len(content) // 2
        if fault == "short":
            content, length = content[:half], half
        if fault == "long":
            content, length = content + b"more", len(content) + 4
        if fault == "stall":
            time.sleep(server.stall_s)
        if fault == "reset":
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:half] if fault == "truncated" else content)
        self.close_connection |= fault == "truncated"

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client has gone, as it may
            super().handle()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer


def folder_upstream(folder: Path) -> Upstream:
    """Files with ranges and ETags, folders as pages of links."""

    def answer(method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        path = folder / unquote(urlsplit(target).path).lstrip("/")
        if path.is_dir():
            links = (f'<a href="{p.name}{"/" * p.is_dir()}">x</a>' for p in sorted(path.iterdir()))
            others = '<a href="/">up</a> <a href="https://elsewhere.invalid/x.txt">x</a>'
            page = "".join([others, *links]).encode()
            return 200, {"Content-Type": "text/html", "Content-Length": str(len(page))}, page
        if not path.is_file():
            return 404, {}, b""
        content, status = path.read_bytes(), 200
        told = {
            "ETag": f'"{path.stat().st_mtime_ns:x}"',
            "Content-Type": "application/octet-stream",
        }
        if method == "HEAD":
            return 200, told | {"Content-Length": str(len(content))}, b""
        if wanted := headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            if int(first) >= len(content):
                return 416, {}, b""
            part = content[int(first) : int(last) + 1]
            end = int(first) + len(part) - 1
            told["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
            content, status = part, 206
        return status, told, content

    return answer


def proxy_upstream(port: int) -> Upstream:
    """What the server at a port of this machine answers."""

    def answer(method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request(method, target, body, headers)
        response = connection.getresponse()
        told = {name: value for name, value in response.getheaders()}
        for name in ("Connection", "Transfer-Encoding", "Date", "Server"):
            told.pop(name, None)
        content = response.read()
        connection.close()
        if method != "HEAD":
            told.pop("Content-Length", None)
        return response.status, told, content

    return answer


@contextmanager
def serving(upstream: Upstream) -> Iterator[FaultyServer]:
    server = FaultyServer(upstream)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def hub_upstream(folder: Path, repository: str) -> Upstream:
    """A dataset of the Hugging Face Hub, as far as its file system asks for one."""
    files = folder_upstream(folder)

    def facts(path: Path) -> dict[str, object]:
        name = {"path": path.relative_to(folder).as_posix()}
        if path.is_dir():
            return name | {"type": "directory", "oid": "0" * 40}
        oid = hashlib.sha1(path.read_bytes()).hexdigest()
        return name | {"type": "file", "size": path.stat().st_size, "oid": oid}

    def answer(method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        path, api = unquote(urlsplit(target).path), f"/api/datasets/{repository}"
        resolve = f"/datasets/{repository}/resolve/main/"
        if path.startswith(resolve):
            return files(method, "/" + path.removeprefix(resolve), headers, body)
        found: object = {"id": repository, "sha": "1" * 40, "siblings": []}
        if path.startswith(f"{api}/tree/main"):
            inside = folder / path.removeprefix(f"{api}/tree/main").lstrip("/")
            if not inside.is_dir():
                return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
            deep = "recursive=True" in target
            found = [facts(p) for p in sorted(inside.rglob("*") if deep else inside.iterdir())]
        elif path.startswith(f"{api}/paths-info/main"):
            text = body.decode()
            names = json.loads(text)["paths"] if text[0] == "{" else parse_qs(text)["paths"]
            found = [facts(folder / name) for name in names if (folder / name).exists()]
        elif not path.startswith(api):
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()

    return answer


def gcs_upstream(folder: Path) -> Upstream:
    """A bucket of Google Cloud Storage, as far as gcsfs asks its JSON API for one."""
    files = folder_upstream(folder)

    def facts(path: Path) -> dict[str, str]:
        name = path.relative_to(folder).as_posix()
        size, now = str(path.stat().st_size), "2026-01-01T00:00:00.000Z"
        times = {"updated": now, "timeCreated": now}
        return times | {"name": name, "bucket": "b", "size": size, "etag": "e", "generation": "1"}

    def answer(method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        parts = urlsplit(target)
        asked, name = parse_qs(parts.query), unquote(parts.path.partition("/o/")[2])
        if "media" in asked.get("alt", ()):
            return files(method, f"/{quote(name)}", headers, body)
        if parts.path.endswith("/o"):
            prefix = asked.get("prefix", [""])[0]
            inside = sorted((folder / prefix).glob("*"))
            folders = [f"{p.relative_to(folder).as_posix()}/" for p in inside if p.is_dir()]
            items = [facts(p) for p in inside if p.is_file()]
            found: object = {"items": items, "prefixes": folders}
        elif (folder / name).is_file():
            found = facts(folder / name)
        else:
            return 404, {"Content-Type": "application/json"}, b'{"error": {"code": 404}}'
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()

    return answer
