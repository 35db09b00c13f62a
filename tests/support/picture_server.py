"""Web server that serves pictures on loopback, and fails for pictures that it does not have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@contextmanager
def picture_server(pictures: dict[str, bytes]) -> Iterator[str]:
    """Serve pictures on loopback. A request for any other path gets an answer with status 500."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = pictures.get(self.path, b"")
            self.send_response(200 if content else 500)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
