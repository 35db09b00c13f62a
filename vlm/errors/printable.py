"""Functions that hide secrets in a text and make its control characters visible, before people read the text.

The text of an error may come from a server or a library, which may repeat a password of the request or send escape
sequences to the terminal. Therefore every error message and every log line passes through `printable`.
"""

from __future__ import annotations

import json
import logging
import os
import re
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterator
from functools import lru_cache
from html.entities import codepoint2name
from pathlib import Path
from urllib.parse import quote, unquote

SECRET_NAME = re.compile("TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|KEY|AUTH")
"""Pattern of the names of environment variables whose values may be secrets."""
NOT_SECRET_NAME = re.compile("AUTH_TYPE$|TRACKING_AUTH$|_SOCK$|_FILE$|_PATH$|_DIR$|_LIFETIME$|_PARALLELISM$")
"""Pattern of the names that match SECRET_NAME although the values are no secrets, but a mode, a file or a number."""
HIDDEN = "***"

_USER_INFO = re.compile(
    r"(//|(?<=\w:)(?<!models:)/)(?:[^/\s:@]*:\S*|[^/\s]*|[^/\s:@]+:(?!\d{1,5}(?:[^\w@]|$))[^\n@]*)@"
)
"""Pattern of `//user:password@` and `scheme:/user:password@` up to the last `@`; the password may contain `@` and `/`.

A password may also contain blanks if it does not begin like a port number. Therefore `http://host:5000 does not know
me@work` contains no password.

`models:/name@alias` is MLflow's URI of a model version, which contains no secret.
"""
_BARE_USER_INFO = re.compile(r"""(?<![^\s'"`(=,\[{])[^\s/:@'"`(=,\[{]+:(?!/)\S*@""")
"""Pattern of `user:password@` at the beginning of a word, as in a URI without a scheme."""
_QUERY = re.compile(r"((?:\w:|/)/\S*?)\?\S*=\S*")
_HEADER = re.compile(r"\b(Basic|Bearer) [\w+/=.~-]{16,}")
_USER_INFO_OF_VARIABLE = re.compile(
    r"(?:[A-Za-z][\w+.-]*:/{1,2})?([^\s/:@]*:(?!//)\S*|(?<=/)[^/:@\n]*:[^\n]*|(?<=/)[^\s/]+)@"
)
_WORD_START = r"(?:(?<![^\W_])|(?<=%[0-9A-Fa-f]{2})|(?<=\\u[0-9A-Fa-f]{4})|(?<=\\[nrt]))"
"""Pattern of the start of a word. A word may also start after an encoded character such as %3D, which ends in a letter
or a digit."""
_WORD_END = r"(?![^\W_])"
_BACKSLASHES_OR_CHARACTER = re.compile(r"\\+|.", re.DOTALL)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Pattern of all control characters except line feed and tab, and of other characters that a terminal must not receive.

The other characters are the separators of lines and paragraphs, the characters that control the text direction, and
the surrogates, which UTF-8 cannot encode. Python uses surrogates for the bytes of a file name that are not UTF-8.
"""


def printable(text: str) -> str:
    """Hide the secrets in a text, and replace its control characters (except line feed and tab) by escape sequences."""
    return escape_controls(hide_secrets(text))


def escape_controls(text: str) -> str:
    """Replace the control characters in a text (except line feed and tab) by escape sequences such as \\x1b."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def on_one_line(text: str) -> str:
    """Replace the control characters in a text (except tab) by escape sequences, so that the text is a single line."""
    return escape_controls(text).replace("\n", r"\n")


def escape_controls_in_json(text: str) -> str:
    """Replace the control characters in a JSON text (except line feed and tab) by JSON's escape sequences (\\u009b).

    JSON allows the control characters from U+007F to U+009F in strings, but a terminal executes some of them.
    """
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def hide_secrets(text: str) -> str:
    """Hide the secrets in a text that people will read.

    In URIs, remove the user information, and each query string that contains `=`. In all other places, write `***` in
    place of `user:password` before an `@`. Write `***` in place of credentials of at least 16 characters in an
    Authorization header (Basic or Bearer). Write `***` in place of the values of environment variables that hold
    secrets (`SECRET_NAME`), and in place of the user information of URIs in environment variables. The secrets of
    environment variables are found even if a server has encoded the secrets for a URL, a form, HTML or JSON, or as
    base64 or hexadecimal text.
    """
    known = _pattern(tuple(os.environ.items()))
    if known is not None:
        text = known.sub(HIDDEN, text)
    text = _HEADER.sub(rf"\1 {HIDDEN}", _QUERY.sub(r"\1", _USER_INFO.sub(r"\1", text)))
    return _BARE_USER_INFO.sub(f"{HIDDEN}@", text)


class PrintableFormatter(logging.Formatter):
    """Formatter whose log lines and tracebacks contain neither secrets nor control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the printable text of a log record."""
        return printable(super().format(record))


@lru_cache(maxsize=1)
def _pattern(environment: tuple[tuple[str, str], ...]) -> re.Pattern[str] | None:
    """Return a pattern of all secrets in environment variables, longest first, or None if there are no secrets."""
    given = {form for value in _secrets(dict(environment)) for form in (value, unquote(value)) if _is_secret(form)}
    secrets = given | {quote(each, safe="", errors="surrogateescape") for each in given}
    secrets |= {code for each in given for code in _base64_codes(each)}
    forms = {each: _in_any_encoding(each) for each in secrets}
    forms |= {each: f"(?i:{each})" for each in map(_hex_code, given)}
    # A short secret may be part of other words, so it is replaced only if it is a whole word.
    for short in (each for each in forms if len(each) < 8):
        forms[short] = f"{_WORD_START}{forms[short]}{_WORD_END}"
    return re.compile("|".join(forms[each] for each in sorted(forms, key=len, reverse=True))) if forms else None


def _in_any_encoding(secret: str) -> str:
    """Return a pattern of a secret in each encoding of URLs, forms, HTML and JSON, and in Python's `repr`.

    The pattern accepts each character of the secret in any encoding, because the encodings change different sets of
    characters. No encoding changes the letters and digits of ASCII. The pattern can match a text in only one way. If a
    pattern can match in several ways, a search in a text that contains a part of the secret may need exponential time.
    """
    return "".join(
        each if each.isascii() and each.isalnum() else _backslashes(len(each)) if each[0] == "\\" else _encodings(each)
        for each in _BACKSLASHES_OR_CHARACTER.findall(secret)
    )


def _encodings(character: str) -> str:
    plain, in_json = re.escape(character), json.dumps(character)[1:-1]
    forms = [_codes(character)]
    if len(in_json) == 2 and in_json[1] != character:  # `in_json` is an escape such as \n for a line feed
        forms.append(re.escape(in_json))
    # The unencoded character comes last, because the encodings of % and & (such as %25 and &amp;) begin with % and &.
    return f"(?:{'|'.join(forms)}|\\\\?{plain}{'|[+]' * (character == ' ')})"


def _backslashes(count: int) -> str:
    """Return a pattern of `count` backslashes in a row. JSON and `repr` write each backslash as two backslashes."""
    return rf"(?:(?:{_codes(chr(92))}){{{count}}}|\\{{{count},{2 * count}}}+)"


def _codes(character: str) -> str:
    """Return a pattern of all encodings in which the code or the name of a character stands for the character."""
    code, in_utf16 = ord(character), character.encode("utf-16-be", "surrogatepass")
    percent = "".join(f"%{byte:02x}" for byte in _bytes(character))
    in_json = "".join(rf"\\u{in_utf16[start : start + 2].hex()}" for start in range(0, len(in_utf16), 2))
    forms = [f"(?i:{percent}|{in_json}|&#0*{code};|&#x0*{code:x};)", rf"(?i:\\x{code:02x})"]
    return "|".join(forms + [f"&{name};" for name in ({39: "apos"} | codepoint2name).get(code, "").split()])


def _base64_codes(secret: str) -> set[str]:
    """Return the base64 texts of a secret, with and without the padding, in the alphabets of MIME and of URLs."""
    padded = {encode(_bytes(secret)).decode() for encode in (b64encode, urlsafe_b64encode)}
    return padded | {each.rstrip("=") for each in padded}


def _hex_code(secret: str) -> str:
    return _bytes(secret).hex()


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _secrets(environment: dict[str, str]) -> Iterator[str]:
    """Yield the secrets in environment variables. Also yield user and password as base64 text, as HTTP requests contain
    them.
    """
    for name, value in environment.items():
        if SECRET_NAME.search(name.upper()) and not NOT_SECRET_NAME.search(name.upper()):
            yield value
            for user in (name.replace("PASSWORD", "USERNAME"), name.replace("PASSWORD", "USER")):
                if user != name and user in environment:
                    yield _base64(f"{environment[user]}:{value}")
        if info := _USER_INFO_OF_VARIABLE.match(value):
            user, colon, password = info[1].partition(":")
            yield from (info[1], _base64(info[1]), _base64(unquote(info[1])))
            # If a password contains `@`, some libraries split the URI there and report a part of the password as the
            # host.
            yield from (password, *password.split("@")) if colon else (user,)


def _base64(text: str) -> str:
    return b64encode(_bytes(text)).decode()


def _is_secret(value: str) -> bool:
    """Return whether a value is long enough to be a secret, and is neither a switch, a small number nor the path of an
    existing file or folder.
    """
    if len(value) < 4 or value.lower() in ("true", "false", "none", "null", "auto"):
        return False
    return not (value.isdigit() and len(value) < 6) and not _exists(value)


def _exists(value: str) -> bool:
    try:
        return Path(value).exists()
    except (OSError, ValueError):  # the value is too long for a file name, or has a zero byte
        return False
