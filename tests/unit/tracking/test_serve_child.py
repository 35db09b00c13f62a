"""Tests that the model server refuses requests that pages of other websites can send through the user's browser."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from open_sockets import free_port
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from pipelines.tracking.children.serve_child import loopback_only


async def answer(request: Request) -> PlainTextResponse:
    return PlainTextResponse(request.method)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Serve a small application behind `loopback_only`, and yield the port."""
    app = Starlette(routes=[Route("/", answer, methods=["GET", "POST"])])
    number = free_port()
    server = uvicorn.Server(uvicorn.Config(loopback_only(app), host="127.0.0.1", port=number, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield number
    server.should_exit = True
    thread.join()


def status(port: int, method: str, **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, "/", headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{}", "127.0.0.1.evil.example", "10.evil.example", "localhost.evil:{}", ""]
)
def test_a_request_with_the_host_name_of_another_website_is_refused(port: int, host: str) -> None:
    for method in ("GET", "POST"):
        assert status(port, method, Host=host.format(port)) == 400


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "https://127.0.0.1.evil.example",
        "http://localhost@evil.example",
        "null",
        "http://[::1",
        "",
    ],
)
def test_a_post_request_of_a_page_of_another_website_is_refused(port: int, origin: str) -> None:
    assert status(port, "POST", Origin=origin) == 403
    assert status(port, "GET", Origin=origin) == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:{}", "localhost:{}", "LOCALHOST:{}"])
def test_programs_and_pages_of_this_machine_are_answered(port: int, host: str) -> None:
    assert status(port, "POST", Host=host.format(port)) == 200
    assert status(port, "POST", Host=host.format(port), Origin=f"http://{host.format(port)}") == 200
    assert status(port, "GET", Host=host.format(port)) == 200
