"""Write docs/reference.md, which describes every command, config key and table column, from the code.

    python .ci/reference.py

A test fails when the page differs from what this script writes.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.testing import CliRunner

from jobs.cli import COMMANDS, app
from jobs.table_files import COMMANDS as COMMANDS_OF_TABLES
from pipelines.config import RunConfig
from pipelines.formats import champion_captions
from pipelines.formats.table_schema import sql_type
from pipelines.formats.tables import TABLES

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"
HEADER = """# Reference

This page lists every command, every config key and every Delta table. The other pages explain how to use the
commands, keys and tables. Do not edit this page: `python .ci/reference.py` writes the page from the code.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(), encoding="utf-8")


def render() -> str:
    """Return the content of the page."""
    keys = ["## Config keys\n", CONFIG_NOTE, *config_keys()]
    return "\n".join([HEADER, "## Commands\n", *commands(), *keys, "## Tables\n", *tables()])


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


def paragraph(text: str) -> str:
    """Return a Markdown paragraph with lines of at most 120 characters."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n"


# ------------------------------------------------------------------------------------------------ commands


def commands() -> Iterator[str]:
    """Yield a part of the page for each command, with the text of its --help."""
    for name in COMMANDS:
        text = CliRunner().invoke(app, [name, "--help"], prog_name="lakesight", terminal_width=80).output
        yield f"### lakesight {name}\n\n```\n{text.strip()}\n```\n"


# ------------------------------------------------------------------------------------------------ config keys

CONFIG_NOTE = """The config of a run has these keys. The YAML files in `conf/` set keys, and the option
`--set KEY=VALUE` of a command overrides a key, for example `--set train.steps=500`.

In the tables below, the type "section" means that the key contains further keys. The heading of a section gives the
path of its keys: the key `size` in the section `model.image` is `model.image.size`. If a section has the key `kind`,
the value of `kind` decides which further keys the section has. "required" in the column "default" means that the key
has no default.
"""


def config_keys() -> Iterator[str]:
    """Yield a part of the page for each section of the config."""
    places: dict[type[BaseModel], list[str]] = {}
    for name in ("model", "data", "train", "platform", "gate", "drift"):
        for model in models_in(RunConfig.model_fields[name].annotation):
            collect(model, name, places)
    for model, paths in places.items():
        kind = model.model_fields.get("kind")
        suffix = f" (kind: {get_args(kind.annotation)[0]})" if kind else ""
        yield f"### {paths[0]}{suffix}\n"
        yield f"{first_sentence(model)}\n"
        if paths[1:]:
            has = "The section {} has" if len(paths) == 2 else "The sections {} have"
            yield paragraph(f"{has.format(listed(paths[1:], 'and'))} the same keys.")
        meanings = attributes(model)
        rows = [
            (
                f"`{field.alias or name}`",
                type_text(field),
                default_text(field),
                meaning(model, field, meanings.get(name)),
            )
            for name, field in model.model_fields.items()
            if name != "kind"
        ]
        yield table(("key", "type", "default", "meaning"), rows) if rows else "This section has no key except `kind`.\n"


def collect(model: type[BaseModel], path: str, places: dict[type[BaseModel], list[str]]) -> None:
    """Add a config class, and the config classes of its fields, to `places`, a dict from class to the paths of its
    keys.
    """
    if path in places.setdefault(model, []):
        return
    places[model].append(path)
    for name, field in model.model_fields.items():
        for nested in models_in(field.annotation):
            collect(nested, f"{path}.{field.alias or name}", places)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the config classes in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def meaning(model: type[BaseModel], field: FieldInfo, described: str | None) -> str:
    """Return the meaning of a key: the description in the docstring of the class, then the kinds of a section.

    Raises:
        ValueError: the docstring of the class does not describe the key, and the key is not a section of one kind.
    """
    sections = models_in(field.annotation)
    if described is None and len(sections) == 1:
        return first_sentence(sections[0])
    if described is None:
        raise ValueError(f"{model.__name__}: describe each key under `Attributes` in the docstring")
    if len(sections) < 2:
        return described
    kinds = [f"`{get_args(section.model_fields['kind'].annotation)[0]}`" for section in sections]
    return f"{described} The `kind` of the section is {listed(kinds, 'or')}."


def listed(texts: list[str], word: str) -> str:
    """Join texts by commas, and the last two texts by `word`, such as "and"."""
    return f" {word} ".join([", ".join(texts[:-1]), texts[-1]] if texts[1:] else texts)


def first_sentence(model: type[BaseModel]) -> str:
    """Return the first line of the docstring of a config class."""
    return inspect.cleandoc(model.__doc__ or "").partition("\n")[0]


def attributes(model: type[BaseModel]) -> Mapping[str, str]:
    """Return a dict from each field of a config class to its meaning in the docstrings of the class and its base
    classes.
    """
    found: dict[str, str] = {}
    for base in reversed([each for each in model.__mro__ if issubclass(each, BaseModel) and each is not BaseModel]):
        text = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        for name, meaning in re.findall(r"^    (\w+): (.*?)(?=^    \w+: |^\S|\Z)", text, re.M | re.S):
            found[name] = " ".join(meaning.split())
    return found


def type_text(field: FieldInfo) -> str:
    """Return the type and the bounds of a field as text, such as "integer (> 0)"."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [f"{signs[name]} {value:g}" for each in field.metadata for name, value in bound_values(each, signs)]
    return " ".join([name_of(field.annotation), *([f"({', '.join(bounds)})"] if bounds else [])])


def bound_values(constraint: Any, signs: Mapping[str, str]) -> Iterator[tuple[str, float]]:
    """Yield each bound that a constraint of pydantic sets: the name of the bound, such as "ge", and its value."""
    for name in signs:
        value = getattr(constraint, name, None)
        if isinstance(value, int | float):
            yield name, value


NAMES = {NoneType: "null", str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}


def name_of(annotation: Any) -> str:
    """Return the name of a type."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(f"`{part}`" for part in parts)
    if origin in (Annotated, Union, UnionType):
        return " or ".join(dict.fromkeys(map(name_of, parts[:1] if origin is Annotated else parts)))
    if origin is not None:
        is_mapping = issubclass(origin, Mapping)
        return f"mapping from text to {name_of(parts[-1])}" if is_mapping else f"list of {plural(name_of(parts[0]))}"
    if issubclass(annotation, BaseModel):
        return "section"
    return NAMES.get(annotation, annotation.__name__)


def plural(name: str) -> str:
    """Return the name of a type for several values, such as "integers or nulls" for "integer or null"."""
    return re.sub(r"(text|integer|number|null|section)\b", r"\1s", name)


def default_text(field: FieldInfo) -> str:
    """Return the default of a field, or an empty text if the default is a section."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return "" if isinstance(default, BaseModel) else f"`{json.dumps(default, default=str)}`"


# ------------------------------------------------------------------------------------------------ tables


def tables() -> Iterator[str]:
    """Yield a part of the page for each Delta table, and a part for the view."""
    for each in TABLES:
        key = listed([f"`{name}`" for name in each.key], "and")
        identify = f"The {'columns' if each.key[1:] else 'column'} {key} {'identify' if each.key[1:] else 'identifies'}"
        writer = f"`lakesight {COMMANDS_OF_TABLES[each.name]}` writes the table."
        yield f"### Table {each.name}\n"
        yield paragraph(f"{each.comment}. {identify} a row. {writer}")
        yield table(
            ("column", "type", "null", "meaning"),
            [(f"`{c.name}`", sql_type(c.type), "yes" if c.nullable else "no", c.comment) for c in each.columns],
        )
    yield f"### View {champion_captions.NAME}\n"
    yield paragraph(f"{champion_captions.COMMENT}.")
    yield table(("column", "meaning"), [(f"`{name}`", text) for name, text in champion_captions.COLUMNS.items()])


if __name__ == "__main__":
    main()
