"""Tests of rows with URLs of pictures: reads are limited in bytes and in time, and never leave the root."""

from __future__ import annotations

import gzip
import io
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.executor.ingest.records.pictures import urls
from pipelines.executor.ingest.records.pictures.root import PictureRoot
from pipelines.executor.ingest.storage import StorageFault

REDIRECTS = {
    "redirect-in": "/p/a.png",
    "redirect-out": "/private.png",
    "redirect-host": "http://localhost:1/p/a",
    "redirect-loopback": "http://127.0.0.1:1/p/a",
    "redirect-link-local": "http://169.254.169.254/p/a",
    "redirect-https": "https://{host}/p/a",
    "redirect-user": "http://user:password@{host}/p/a",
    "redirect-file": "file:///etc/hostname",
    "redirect-file-path": "file://{host}/p/a",
    "redirect-ftp": "ftp://{host}/p/a",
    "redirect-data": "data:image/png;base64,AAAA",
}
"""Dict from the last part of a path to the target to which the server redirects. All other names that begin with
`redirect` redirect to themselves."""


class PictureServer(BaseHTTPRequestHandler):
    """Web server whose answers depend on the path."""

    requested: list[str]

    def do_GET(self) -> None:
        """Answer a request."""
        self.requested.append(self.path)
        name = self.path.rpartition("/")[2]
        if name.startswith("redirect"):
            self.send_response(302)
            host = self.headers["Host"]
            self.send_header("Location", REDIRECTS.get(name, self.path).replace("{host}", host))
            self.end_headers()
            return
        status = int(name) if name.isdigit() else 200
        if name == "once" and self.requested.count(self.path) == 1:
            status = 503
        self.send_response(status)
        if name in ("packed", "cut"):  # some servers compress answers without being asked
            body = gzip.compress(bytes(50))
            self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(body if name == "packed" else body[:12])
            return
        if name == "short" or (name == "short-once" and self.requested.count(self.path) == 1):
            self.send_header("Content-Length", "50")  # the server closes the connection before it has sent all bytes
        self.end_headers()
        if name == "slow":
            time.sleep(3)
        agent = self.headers["User-Agent"].encode() if name == "agent" else self.path.encode()
        self.wfile.write(bytes(1_000) if name == "large" else agent)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Yield the URL of a running web server."""
    PictureServer.requested = []
    with ThreadingHTTPServer(("127.0.0.1", 0), PictureServer) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/p"
        running.shutdown()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "PAUSE_SECONDS", 0.01)


def read(root: str, name: object) -> bytes | str:
    found = PictureRoot(root, max_bytes=100).read(name)
    return found if isinstance(found, bytes) else f"{found.reason}: {found.detail}"


def test_a_row_may_name_a_picture_on_a_web_server_by_path_or_by_url(server: str) -> None:
    assert read(server, "a.png") == b"/p/a.png"
    assert read(server, "./in/a b#1.png") == b"/p/./in/a%20b%231.png"
    assert read(server, "a%20b.png?size=1") == b"/p/a%20b.png?size=1"
    assert read(server, f"{server}/100%.png") == b"/p/100%25.png"
    assert read(server, "once") == b"/p/once"
    assert read(server, "redirect-in") == b"/p/a.png"
    assert read(server, "packed") == bytes(50)
    assert read(server, "short-once") == b"/p/short-once"
    assert read(server, "agent") == b"lakesight"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("404", "missing_field: http"),
        ("410", "missing_field: http"),
        ("403", "status 403"),
        ("500", "status 500"),
        ("large", "too_large: more than 100 bytes"),
        ("cut", "unreadable_file"),
        ("short", "/p/short: IncompleteRead"),
        ("redirect-out", "unreadable_file"),
        *((name, "unreadable_file") for name in REDIRECTS if name != "redirect-in"),
        ("redirect-loop", "unreadable_file"),
        ("../private.png", "missing_field"),
        ("%2e%2e/private.png", "missing_field"),
        ("in/%252e%252e/%252e%252e/private.png", "missing_field"),
        ("/private.png", "missing_field"),
        ("https://127.0.0.1/p/a.png", "missing_field"),
        ("http://localhost/p/a.png", "missing_field"),
        ("http://user@{host}/p/a.png", "missing_field"),
        ("http://{host}/private.png", "missing_field"),
        ("http://{host}/p-private/a.png", "missing_field"),
        ("file:///etc/hostname", "missing_field"),
    ],
)
def test_no_url_outside_the_image_root_is_requested_and_an_unreadable_picture_gives_a_problem(
    server: str, name: str, words: str
) -> None:
    PictureServer.requested.clear()
    found = read(server, name.replace("{host}", server.split("/")[2]))
    assert isinstance(found, str)
    assert words in found
    assert all(path.startswith("/p/") and ".." not in path for path in PictureServer.requested)
    assert len(PictureServer.requested) <= 12, "a redirection is followed at most 10 times"


def test_a_redirection_from_https_to_http_is_not_followed() -> None:
    handler, request = urls._StayBelow("https://host/p"), urllib.request.Request("https://host/p/a")
    arguments = (request, io.BytesIO(), 302, "Found", HTTPMessage())
    assert handler.redirect_request(*arguments, "https://host/p/b") is not None
    with pytest.raises(urllib.error.HTTPError, match="outside of the root"):
        handler.redirect_request(*arguments, "http://host/p/b")


def test_reading_a_picture_from_a_url_ends_at_the_time_limit(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "READ_SECONDS", 0.2)
    started = time.monotonic()
    assert read(server, "slow") == "unreadable_file: not read within 0.2 seconds"
    assert time.monotonic() - started < 2


def test_the_task_fails_and_no_row_is_refused_if_the_picture_server_does_not_answer() -> None:
    with pytest.raises(ConnectionError, match="does not answer"):
        read("http://127.0.0.1:9/p", "a.png")


class Store(MemoryFileSystem):  # type: ignore[misc]
    """Object store in memory, in which files called slow.png are opened after 3 seconds."""

    protocol = ("gs", "gcs")
    store: dict[str, Any] = {}  # noqa: RUF012 (as in fsspec)
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("gs://").removeprefix("gcs://").strip("/")

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        time.sleep(3 if path.endswith("slow.png") else 0)
        return super()._open(path, mode, **options)


@pytest.fixture
def store() -> Iterator[MemoryFileSystem]:
    """Yield an object store with the buckets `b` and `other`."""
    urls._store.cache_clear()
    fsspec.register_implementation("gs", Store, clobber=True)
    fsspec.register_implementation("gcs", Store, clobber=True)
    system = Store(skip_instance_cache=True)
    for name in ("b/p/a.png", "b/p/in/a b.png", "b/p/a%20b.png", "b/private.png", "other/p/a.png"):
        system.pipe_file(f"/{name}", name.encode())
    system.pipe_file("/b/p/large.png", bytes(101))
    yield system
    urls._store.cache_clear()


def test_a_row_may_name_a_picture_in_an_object_store_by_its_key_or_by_its_url(store: MemoryFileSystem) -> None:
    assert read("gs://b/p", "a.png") == b"b/p/a.png"
    assert read("gs://b/p/", "in\\a b.png") == b"b/p/in/a b.png"
    assert read("gs://b/p", "in/a%20b.png") == b"b/p/in/a b.png"
    assert read("gs://b/p", "a%20b.png") == b"b/p/a%20b.png"
    assert read("gs://b/p", "gcs://b/p/a.png") == b"b/p/a.png", "another name of the same scheme"
    assert read("gs://b/p", "large.png") == "too_large: more than 100 bytes"
    assert read("gs://b/p", "z.png") == "missing_field: gs://b/p has no file 'z.png'"
    for name in ("gs://other/p/a.png", "gs://b/private.png", "../private.png", "s3://b/p/a.png", "/b/private.png"):
        assert str(read("gs://b/p", name)).startswith("missing_field: ")


def test_a_row_whose_text_is_no_possible_key_is_refused_without_a_request(
    store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = "\u00e9" * 511
    store.pipe_file(f"/b/p/{longest}", b"picture")
    assert read("gs://b/p", longest) == b"picture"
    monkeypatch.setattr(Store, "_open", None)
    for name in (longest + "a", "a\nb.png", "\ta.png"):
        assert "cannot be the name of a file in gs://b/p" in str(read("gs://b/p", name))
    assert urls._is_key("abfs://b@account/p", longest + "a"), "Azure counts characters"
    assert not urls._is_key("abfs://b@account/p", "a" * 1023)


def test_a_picture_that_an_object_store_does_not_send_in_time_fails_the_task(
    store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urls, "READ_SECONDS", 0.2)
    with pytest.raises(StorageFault, match=r"gs://b/p/slow\.png cannot be read: TimeoutError: not read within 0\.2 s"):
        read("gs://b/p", "slow.png")
