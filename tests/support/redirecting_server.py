"""Two HTTP servers: the first server redirects each request to the second server, which has another host name."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Redirected(NamedTuple):
    """The host and port of the first server, and the `Authorization` headers that each server has received."""

    host: str
    first: list[str]
    second: list[str]


@contextmanager
def redirecting_servers(status: int = 302) -> Iterator[Redirected]:
    """Run both servers on the loopback device. The second server answers each request with an empty page."""
    first: list[str] = []
    second: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            second.append(self.headers.get("Authorization", ""))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    class Redirect(Answer):
        def do_GET(self) -> None:
            first.append(self.headers.get("Authorization", ""))
            self.send_response(status)
            self.send_header("Location", f"http://localhost:{target.server_address[1]}{self.path}")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_HEAD = do_GET

    with ExitStack() as stack:
        target = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Answer))
        server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Redirect))
        for each in (target, server):
            threading.Thread(target=each.serve_forever, args=(0.01,), daemon=True).start()
            stack.callback(each.shutdown)
        yield Redirected(f"127.0.0.1:{server.server_address[1]}", first, second)
