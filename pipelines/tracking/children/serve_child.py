"""Model server of `lakesight serve`: serve the model version in a folder over REST on the loopback device.

    python -P serve_child.py FOLDER PORT

The server answers like `mlflow models serve`. In addition, the server refuses requests that a page of another website
could send from the user's browser. Requests with a foreign `Host` header are refused, because the other website can let
its own name resolve to this machine (DNS rebinding). Requests that may change state (all methods except GET, HEAD and
OPTIONS) are refused if they have a foreign `Origin` header. MLflow's own server checks neither of the two headers.

This script must not import any Lakesight package, because the version brings its own copy of the code.
"""

import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SERVE_SCRIPT = Path(__file__)
HOSTS = ["127.0.0.1", "localhost"]
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


def is_foreign(origin: str) -> bool:
    """Return true if the value of an `Origin` header differs from every origin of a page of this machine.

    A page without an origin of its own, such as a local file, sends the value `null`, which counts as foreign.
    """
    try:
        return urlsplit(origin).hostname not in HOSTS
    except ValueError:
        return True


def loopback_only(app: App) -> App:
    """Wrap an ASGI application so that only programs and pages of this machine can use it.

    A request with a foreign `Host` header is answered with status 400. A request that may change state and has a
    foreign `Origin` header is answered with status 403. Programs send no `Origin` header.
    """
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import PlainTextResponse

    async def check_origin(scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] not in SAFE_METHODS:
            origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
            if any(map(is_foreign, origins)):
                refusal = PlainTextResponse("a page of another website may not send this request", 403)
                await refusal(scope, receive, send)
                return
        await app(scope, receive, send)

    return TrustedHostMiddleware(check_origin, HOSTS)


def main(folder: str, port: str) -> None:
    """Load the version and serve it until the process receives SIGINT or SIGTERM."""
    import mlflow.pyfunc
    import uvicorn
    from mlflow.pyfunc import scoring_server

    app = scoring_server.init(mlflow.pyfunc.load_model(folder))
    uvicorn.run(loopback_only(app), host=HOSTS[0], port=int(port))


if __name__ == "__main__":
    main(*sys.argv[1:])
