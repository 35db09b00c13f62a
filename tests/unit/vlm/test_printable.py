"""Tests that error messages and log lines contain neither secrets nor control characters, whatever a server answers."""

from __future__ import annotations

import html
import io
import json
import logging
import os
import re
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jobs.common import open_output
from jobs.output import format_error
from vlm.errors import UserError
from vlm.errors.printable import printable


@pytest.fixture(autouse=True)
def few_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove environment variables, because their values could hide parts of a message. PATH and PYTEST* remain."""
    for name in os.environ:
        if name != "PATH" and not name.startswith("PYTEST"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pa@ss/SEKRET@host/x", "https://host/x"),
        ("http:/bob:SEKRET@h", "http:/h"),
        ("got http://bob:SE KRET@h/x.", "got http://h/x."),
        ("http:/SEKRET@h/x", "http:/h/x"),
        ("got bob:SEKRET@h", "got ***@h"),
        ("'bob:SE@KR/ET@h'", "'***@h'"),
        ("s3a://AK:SEKRET@bucket/x", "s3a://bucket/x"),
        ("https://host/x?X-Amz-Signature=SEKRET", "https://host/x"),
        ("Authorization: Basic Ym9iOlNFS1JFVHNla3JldA==", "Authorization: Basic ***"),
        ("Authorization: Bearer SEKRETsekretSEKRET", "Authorization: Bearer ***"),
    ],
)
def test_user_information_of_uris_and_authorization_headers_are_hidden(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "models:/demo@champion",
        "sqlite:////data/me@work/mlflow.db",
        "/data/me@work/icon@2x.png",
        "the pictures cat@2x.png and s3a://bucket/img?.png, did you mean 'x'?",
        "http://host:5000 does not know me@work",
        "line 1\n\tline 2 \u2013 \u00e9",
    ],
)
def test_a_text_without_secrets_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("variables", "leak"),
    [
        ({"MLFLOW_TRACKING_TOKEN": "t0ken"}, "t0ken"),
        ({"AWS_SECRET_ACCESS_KEY": "abc/def+ghi"}, "abc%2Fdef%2Bghi"),
        (
            {"MLFLOW_TRACKING_USERNAME": "bob", "MLFLOW_TRACKING_PASSWORD": "pw12"},
            b64encode(b"bob:pw12").decode(),
        ),
        ({"MLFLOW_TRACKING_URI": "http://bob:pw12@h:5000"}, b64encode(b"bob:pw12").decode()),
        ({"MLFLOW_TRACKING_URI": "postgresql+psycopg://bob:pa@ssSEKRET@127.0.0.1:1/db"}, "ssSEKRET"),
        ({"MLFLOW_TRACKING_URI": "http://bob:x ySEKRET@h:1"}, "x ySEKRET"),
        ({"MLFLOW_TRACKING_URI": "http://bob smith:x ySEKRET@h:1"}, "x ySEKRET"),
        ({"MLFLOW_REGISTRY_URI": "bob:a%40long%20one@h"}, "a@long one"),
        ({"HTTPS_PROXY": "http://bob:pr0xypass@proxy:3128"}, "pr0xypass"),
    ],
)
def test_the_secrets_of_environment_variables_are_hidden_in_errors_and_logs(
    variables: dict[str, str], leak: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    error = UserError(f"answer {leak}", where=leak, got=["x", f"'{leak}'"], fix=f"do {leak}")
    assert str(error) == "answer ***. Where: ***. Got: x; '***'. Fix: do ***."
    assert leak not in format_error(error, 80, colours=False)
    with open_output(as_json=True):
        try:
            raise ValueError(leak)
        except ValueError:
            logging.getLogger("pipelines").exception("failed with %s", leak)
    printed = capsys.readouterr().err
    assert "failed with ***" in printed
    assert "ValueError: ***" in printed
    assert leak not in printed


def test_switches_numbers_and_files_in_variables_with_names_of_secrets_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("MAX_TOKENS", "4096")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", __file__)
    monkeypatch.setenv("DB_PASSWORD", "demo")
    text = f"false, 4096, {__file__}, demos"
    assert printable(text) == text
    assert printable("run demo") == "run ***"


def lower_percent(text: str) -> str:
    return re.sub("%[0-9A-F]{2}", lambda found: found[0].lower(), quote(text, safe=""))


ENCODINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "url": quote,
    "url of a browser": lambda text: quote(text, safe="!*'()"),
    "url in lower case": lower_percent,
    "url twice": lambda text: quote(quote(text, safe=""), safe=""),
    "form": quote_plus,
    "html": html.escape,
    "html with decimal codes": lambda text: html.escape(text).replace("&#x27;", "&#39;"),
    "html with names": lambda text: html.escape(text).replace("&#x27;", "&apos;"),
    "json": lambda text: json.dumps(text)[1:-1],
    "json with unicode": lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    "json inside html": lambda text: re.sub("[<>&']", lambda found: rf"\u{ord(found[0]):04x}", json.dumps(text)[1:-1]),
    "base64": lambda text: b64encode(text.encode()).decode(),
    "base64 without padding": lambda text: b64encode(text.encode()).decode().rstrip("="),
    "base64 for urls": lambda text: urlsafe_b64encode(text.encode()).decode(),
    "hex": lambda text: text.encode().hex(),
    "hex in upper case": lambda text: text.encode().hex().upper(),
}


@settings(max_examples=40)
@given(
    st.text(
        st.characters(exclude_characters="\0", exclude_categories=["Cs"]) | st.sampled_from("&<>\"'+%/\\ =\u00e9"),
        min_size=4,
        max_size=60,
    )
)
def test_a_secret_is_hidden_in_each_encoding_in_which_a_server_may_repeat_it(secret: str) -> None:
    assume(not (secret.isdigit() and len(secret) < 6) and not secret.isspace())
    assume(secret.lower() not in ("true", "false", "none", "null", "auto"))
    assume(not Path(secret).exists())
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("MLFLOW_TRACKING_PASSWORD", secret)
        shown = {name: printable(f"answer [{encode(secret)}] end") for name, encode in ENCODINGS.items()}
        parts = [printable(encode(secret)[:-1]) for encode in ENCODINGS.values()]
    assert shown == dict.fromkeys(ENCODINGS, "answer [***] end")
    assert len(parts) == len(ENCODINGS), "an answer that ends within a secret is also matched in linear time"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_short_secret_is_hidden_as_a_whole_word_in_each_encoding(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "p'w 1")
    encoded = ENCODINGS[encoding]("p'w 1")
    for before in ("password=", "password%3D", r"\u0022", r"\n", "&quot;"):
        assert printable(f"{before}{encoded}&user=bob") == f"{before}***&user=bob"


@settings(max_examples=100)
@given(st.text("abcdefgh123", min_size=4, max_size=7), st.lists(st.text("abcdefgh123 .", max_size=20)))
def test_words_that_contain_a_short_secret_stay_as_they_are(secret: str, words: list[str]) -> None:
    assume(not secret.isdigit())
    text = " ".join(word for word in " ".join(words).replace(".", " ").split() if word != secret)
    text += f" {secret}s x{secret} {secret}_1.png"
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("DB_PASSWORD", secret)
        assert printable(text).replace("***_1.png", f"{secret}_1.png") == text


def test_a_long_secret_and_a_secret_that_is_not_utf_8_are_hidden_in_messages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = "-----BEGIN KEY-----\n" + "\n".join(["aB3+/" * 12] * 60) + "\n-----END KEY-----"
    monkeypatch.setenv("SERVICE_KEY", key)
    monkeypatch.setenv("DB_PASSWORD", os.fsdecode(b"caf\xe9-latin"))
    assert printable(f"got {json.dumps(key)} and caf%e9-latin") == 'got "***" and ***'


def test_control_characters_are_visible_in_errors_and_logs(capsys: pytest.CaptureFixture[str]) -> None:
    attack = "\x1b[31mred \x1b]0;title\x07 \x9b2J \rover \u202eback"
    shown = r"\x1b[31mred \x1b]0;title\x07 \x9b2J \rover \u202eback"
    error = UserError("refused", got=attack)
    assert str(error) == f"refused. Got: {shown}."
    assert shown in format_error(error, 200, colours=False)
    with open_output(as_json=True):
        logging.getLogger("pipelines").warning("%s", attack)
    assert shown in capsys.readouterr().err


def test_log_lines_of_mlflow_hide_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow  # noqa: F401 (configures its loggers)

    from pipelines.tracking.server import print_logs_safely

    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken")
    print_logs_safely()
    handlers = [each for each in logging.getLogger("mlflow").handlers if isinstance(each, logging.StreamHandler)]
    assert handlers
    for handler in handlers:
        written = io.StringIO()
        monkeypatch.setattr(handler, "stream", written)
        handler.emit(logging.LogRecord("mlflow", logging.WARNING, "", 0, "answer t0ken\x1b[31m", (), None))
        assert "answer ***\\x1b[31m" in written.getvalue()
