"""Tests of the configs in conf/, and tests that model names occur in no code except vlm/weights/ and the tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import available, load_model, load_run

ROOT = Path(__file__).parents[2]
CODE = sorted(file for folder in ("vlm", "pipelines", "jobs", "tests") for file in (ROOT / folder).rglob("*.py"))
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


def words_of(file: Path) -> Iterator[str]:
    """Yield the identifiers and the words of string literals in a file, without imports, comments and docstrings."""
    tree = ast.parse(file.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (*FUNCTION, ast.ClassDef, ast.Module)) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, (*FUNCTION, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg | ast.keyword):
            yield node.arg or ""
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield from re.findall(r"\w+", node.value)


def test_names_of_models_occur_only_in_the_folder_conf_and_not_in_the_code() -> None:
    models = set(available("model")) - {"base"}  # `base` is also the name of a parameter of rotary positions
    assert models
    named = {
        relative(file): sorted(models & {word.lower() for word in words_of(file)})
        for file in CODE
        if not relative(file).startswith(("tests/", "vlm/weights/"))
    }
    assert {file: found for file, found in named.items() if found} == {}


# Parts of model names that may occur in code. Most of them are also ordinary words: for example, `clip` also occurs in
# gradient clipping.
ORDINARY = {"vit", "clip", "nano", "base", "tiny", "emoji", "photo", "small"}


def test_the_model_library_contains_names_of_model_families_only_in_the_package_vlm_weights() -> None:
    tables = {file.stem for file in (ROOT / "vlm/weights/tables").glob("[a-z]*.py")}
    families = {part for name in {*available("model"), *tables} for part in name.split("_")} - ORDINARY
    assert {"gpt2", "gemma", "siglip"} <= families
    files = [file for file in CODE if relative(file).startswith("vlm/") and "weights" not in file.parts]
    named = {relative(file): sorted({word for word in words_of(file) if families & parts_of(word)}) for file in files}
    assert {file: words for file, words in named.items() if words} == {}


def parts_of(word: str) -> set[str]:
    """Split an identifier into lower-case words. For example, load_NameBlock is split into load, name and block."""
    return {part.lower() for part in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+", word)}


@pytest.mark.parametrize("name", available("model"))
def test_every_model_config_in_conf_is_valid(name: str) -> None:
    load_model(name)


TWINS = {"photo_base": "photo_small"}
"""Dict from a model without a tiny version to a smaller shipped model with which the test compares the model."""


@pytest.mark.parametrize("name", sorted(set(available("model")) - {"emoji", "photo_small"}))
def test_every_model_config_has_a_tiny_variant_whose_parts_are_of_the_same_kinds(name: str) -> None:
    twin = name if name.endswith("_tiny") else TWINS.get(name, f"{name}_tiny")
    original, tiny = (kinds_of(load_model(each).model_dump(exclude={"text"})) for each in (name, twin))
    assert original == tiny


def kinds_of(node: Any) -> Any:
    """Replace every number and every list of a config by the word `number`; keep strings, booleans and None."""
    if isinstance(node, dict):
        return {key: kinds_of(value) for key, value in node.items()}
    return node if isinstance(node, str | bool | None) else "number"


@pytest.mark.parametrize("name", available("run"))
def test_every_run_config_in_conf_is_valid(name: str) -> None:
    deployment = {"catalog": "main", "schema": "vision", "volume": "files", "ranks": "2"}
    load_run(name)
    load_run(name, platform="databricks", overrides=[f"platform.{key}={value}" for key, value in deployment.items()])


@pytest.mark.parametrize("kind", ["data", "train", "platform"])
def test_every_config_file_in_conf_is_used_by_a_run(kind: str) -> None:
    used = {"local", "databricks"} if kind == "platform" else set()
    used |= {getattr(load_run(run).chosen, kind) for run in available("run")}
    assert set(available(kind)) <= used
