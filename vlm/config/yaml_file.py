"""Reading of YAML files that people write. The error message for most defects says in which line the defect is.

A key that occurs twice is an error, because the YAML library would silently use the last value.
"""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 2**18
MAX_VALUES = 50_000
"""Maximum number of values in a file. A value counts once more for each alias (`*name`) that refers to the value."""
ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    # The byte-order mark of UTF-32 begins with the mark of UTF-16, so UTF-32 must precede UTF-16 in this list.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class YamlProblem(ValueError):
    """Error for a YAML text that cannot be used. The message says what is wrong. If the line of the defect is known,
    the message names the line.
    """


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping. An empty file counts as an empty mapping.

    A byte-order mark decides the encoding; a file without a byte-order mark is read as UTF-8.

    Raises:
        YamlProblem: the file cannot be read, has more than MAX_BYTES bytes, is not valid YAML, or does not contain a
            mapping whose keys are strings.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: the path contains a NUL character
        raise YamlProblem(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_BYTES:
        raise YamlProblem(f"the file has more than {MAX_BYTES:,} bytes, so it is not a config")
    value = parse_yaml(_decode(data))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise YamlProblem(f"got a {type(value).__name__}, expected a mapping")
    if wrong := [key for key in value if not isinstance(key, str)]:
        raise YamlProblem(f"key {wrong[0]!r} is not a string: write the key in quotes")
    return value


def parse_yaml(text: str) -> Any:
    """Parse a YAML text.

    Raises:
        YamlProblem: the text is not valid YAML, has a key twice, or is too large when its aliases are expanded.
    """
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 (a subclass of the safe loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = ": indent with spaces" if "'\\t'" in str(error.problem) else ""
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise YamlProblem(f"invalid YAML ({place}{what}{hint})") from None
    except RecursionError:
        raise YamlProblem("invalid YAML (lists or mappings are nested too deeply)") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the date 2026-02-30 raises ValueError
        raise YamlProblem(f"invalid YAML ({' '.join(str(error).split())})") from None
    _check_size(value)
    return value


def _decode(data: bytes) -> str:
    encoding = next((name for mark, name in ENCODINGS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x} in line {line} is not {encoding.upper()}"
        raise YamlProblem(f"invalid YAML ({found}: save the file as UTF-8)") from None
    if "\0" in text:
        raise YamlProblem("invalid YAML (the file has NUL bytes: save the file as UTF-8)")
    return text


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with one change: a key that occurs twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, and refuse a key that occurs twice. Keys of merged mappings (`<<`) are added after this
        check, because a key may override a merged key.
        """
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} occurs twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _check_size(value: Any) -> None:
    count, values = 0, [value]
    while values:
        count, found = count + 1, values.pop()
        if count > MAX_VALUES:
            raise YamlProblem(f"invalid YAML (more than {MAX_VALUES:,} values when aliases are expanded)")
        if isinstance(found, dict):
            values += found.values()
        elif isinstance(found, list | tuple | set):
            values += found
