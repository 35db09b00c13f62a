"""The review server: a page of captions with their pictures, on which one click saves a verdict.

On a laptop, the server accepts connections only from this host. However, a page of another website in the reviewer's
browser could also send requests to the server. Therefore the server checks the Host header, and a verdict needs a token
that only the server's own page contains.

In a Databricks App, a proxy of the workspace forwards only requests of users who have logged in, and adds their email
address in a header. The server refuses requests without this header.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from pipelines.errors import UserError
from pipelines.pages.page import render
from pipelines.pages.thumbnail import make_thumbnail
from pipelines.review.verdicts import CaptionPage, CaptionVerdict, Position, Review, Show, key_of, position_of
from vlm.config import read_error_message

PAGE_SIZE = 24
"""Number of captions per page."""
SIDE = 320
"""Largest length of a picture's longer side on the page, in pixels."""
HOSTS = ("127.0.0.1", "localhost")
ALL_HOSTS = ("*",)
"""A Databricks App accepts every Host header, because only the proxy of the workspace can connect to the app."""
USER_HEADER = "x-forwarded-email"
"""Header in which the proxy of a Databricks App sends the email address of the user."""
_SHOW: TypeAdapter[Show] = TypeAdapter(Show)
_POSITION: TypeAdapter[Position] = TypeAdapter(Position)


def forwarded_user(request: Request) -> str:
    """Return the email address that the proxy of a Databricks App has added to a request.

    Raises:
        HTTPException: the request has no email address, so it does not come from the proxy; the status is 403.
    """
    if user := request.headers.get(USER_HEADER):
        return user
    raise HTTPException(403, "log in to the workspace, and open the app by its URL")


def open_app(review: Review, title: str, reviewer: Callable[[Request], str], hosts: Sequence[str] = HOSTS) -> Starlette:
    """Create the server's application.

    The routes are GET / (with the parameters show, words, after and before), GET /picture?id=&sha256= and
    POST /verdict.

    Args:
        review: captions and verdicts.
        title: title of the page.
        reviewer: function that returns the name of the user who has sent a request, or raises an HTTPException.
        hosts: accepted values of the Host header.
    """
    token = secrets.token_urlsafe(16)

    async def page(request: Request) -> Response:
        reviewer(request)
        words = request.query_params.get("words", "")
        try:
            show, after, before = _read_query(request.query_params)
        except ValueError:
            return PlainTextResponse(
                "parameter show must be open, judged or all; copy parameters after and before from a link of the page",
                400,
            )

        def make_page() -> Response:
            review.refresh_if_old()
            selected = review.select_page(show, words, PAGE_SIZE, after=after, before=before)
            return _page(review, selected, show, words, title=title, token=token)

        try:
            return await asyncio.to_thread(make_page)
        except UserError as error:
            return PlainTextResponse(str(error), 503)

    async def picture(request: Request) -> Response:
        reviewer(request)
        # The server decodes pictures and sends thumbnails, because the bytes in the table are not trusted.
        image_id, sha256 = (request.query_params.get(name, "") for name in ("id", "sha256"))
        data = await asyncio.to_thread(lambda: make_thumbnail(review.picture(image_id, sha256), side=SIDE))
        return Response(data, media_type="image/jpeg") if data else PlainTextResponse("no such picture", 404)

    async def verdict(request: Request) -> Response:
        user = reviewer(request)
        if not secrets.compare_digest(request.headers.get("x-lakesight-token", "").encode(), token.encode()):
            return JSONResponse({"error": "the page was loaded from another server process: reload it"}, 403)
        try:
            posted = CaptionVerdict.model_validate_json(await request.body())
            await asyncio.to_thread(review.save_verdict, posted, user)
        except ValidationError as error:
            return JSONResponse({"error": read_error_message(error)}, 422)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 404)
        return JSONResponse({"judged": len(review.judged)})

    routes = [Route("/", page), Route("/picture", picture), Route("/verdict", verdict, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)])


def _read_query(query: Mapping[str, str]) -> tuple[Show, Position | None, Position | None]:
    """Return the parameters show, after and before of a page.

    Raises:
        ValueError: a parameter has no valid value.
    """
    after, before = (_POSITION.validate_json(query[name]) if name in query else None for name in ("after", "before"))
    return _SHOW.validate_python(query.get("show", "open")), after, before


def _page(review: Review, selected: CaptionPage, show: Show, words: str, *, title: str, token: str) -> HTMLResponse:
    """Render some of the captions that `show` and `words` select. `token` allows the page to save verdicts."""
    rows = [
        row | {"verdict": review.judged.get(key_of(row), ""), "texts": texts, "certainty": _certainty(row)}
        for row, texts in zip(selected.rows, review.texts(selected.rows), strict=True)
    ]
    end = selected.start + len(rows)
    nonce = secrets.token_urlsafe(12)
    rendered = render(
        "review.html.j2",
        title=title,
        token=token,
        nonce=nonce,
        show=show,
        words=words,
        rows=rows,
        start=selected.start,
        end=end,
        before=json.dumps(position_of(rows[0])) if rows and selected.start else None,
        after=json.dumps(position_of(rows[-1])) if rows and end < selected.found else None,
        judged=len(review.judged),
        total=len(review.captions),
        found=selected.found,
    )
    policy = (
        f"default-src 'none'; img-src 'self' data:; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(rendered, headers={"Content-Security-Policy": policy, "Cache-Control": "no-store"})


def _certainty(row: Mapping[str, Any]) -> str:
    """Return the certainty of a caption, such as `87 %`: the geometric mean of the probabilities of its tokens."""
    value = row["mean_logprob"]
    return "" if value is None else f"{math.exp(value):.0%}".replace("%", " %")
