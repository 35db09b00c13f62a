"""The house stays readable: small files and functions, variants as data, a README whose tree is the real one."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import available, load_model, load_run

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
CODE = sorted(file for folder in ("vlm", "pipelines", "jobs", "tests") for file in (ROOT / folder).rglob("*.py"))
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_no_file_holds_two_ideas() -> None:
    lengths = {relative(file): len(file.read_text().splitlines()) for file in CODE}
    assert {file: count for file, count in lengths.items() if count >= MAX_FILE_LINES} == {}


def test_no_function_holds_two_ideas() -> None:
    long = [
        f"{relative(file)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for file in CODE
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, FUNCTION) and node.end_lineno and node.end_lineno - node.lineno + 1 >= MAX_FUNCTION_LINES
    ]
    assert long == []


def test_code_is_ascii_and_names_no_machine() -> None:
    for file in CODE:
        text = file.read_text()
        assert text.isascii(), relative(file)
        assert not re.search(r"/(home|Users|work|root)/\w", text), relative(file)


# ------------------------------------------------------------------------------------------------ variants are data


def words_of(file: Path) -> Iterator[str]:
    """Every name and every word of a string in a file's code; comments and docstrings may give examples."""
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


def test_the_name_of_a_model_occurs_in_conf_and_nowhere_else() -> None:
    models = set(available("model")) - {"base"}  # which rotary positions have too
    assert models
    named = {
        relative(file): sorted(models & {word.lower() for word in words_of(file)})
        for file in CODE
        if not relative(file).startswith(("tests/", "vlm/weights/"))
    }
    assert {file: found for file, found in named.items() if found} == {}


# Parts of models' names that are words of the field too: gradients are clipped, rotary positions have a base.
ORDINARY = {"vit", "clip", "nano", "base", "tiny", "emoji"}


def test_no_family_is_known_to_the_model_library_outside_its_weights() -> None:
    tables = {file.stem for file in (ROOT / "vlm/weights/tables").glob("[a-z]*.py")}
    families = {part for name in {*available("model"), *tables} for part in name.split("_")} - ORDINARY
    assert {"gpt2", "gemma", "siglip"} <= families
    files = [file for file in CODE if relative(file).startswith("vlm/") and "weights" not in file.parts]
    named = {relative(file): sorted({word for word in words_of(file) if families & parts_of(word)}) for file in files}
    assert {file: words for file, words in named.items() if words} == {}


def parts_of(word: str) -> set[str]:
    """What an identifier is put together from: of load_NameBlock load, name and block."""
    return {part.lower() for part in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+", word)}


@pytest.mark.parametrize("name", available("model"))
def test_every_model_of_conf_loads(name: str) -> None:
    load_model(name)


@pytest.mark.parametrize("name", sorted(set(available("model")) - {"emoji"}))
def test_every_family_has_a_tiny_twin_of_the_same_kinds(name: str) -> None:
    twin = name if name.endswith("_tiny") else f"{name}_tiny"
    original, tiny = (kinds_of(load_model(each).model_dump(exclude={"text"})) for each in (name, twin))
    assert original == tiny


def kinds_of(node: Any) -> Any:
    """A config with all numbers left out: kinds, switches and words."""
    if isinstance(node, dict):
        return {key: kinds_of(value) for key, value in node.items()}
    return node if isinstance(node, str | bool | None) else "number"


@pytest.mark.parametrize("name", available("run"))
def test_every_run_of_conf_resolves(name: str) -> None:
    deployment = {"catalog": "main", "schema": "vision", "volume": "files", "ranks": "2"}
    load_run(name)
    load_run(name, platform="databricks", overrides=[f"platform.{key}={value}" for key, value in deployment.items()])


@pytest.mark.parametrize("kind", ["data", "train", "platform"])
def test_every_file_of_conf_is_used_by_a_run(kind: str) -> None:
    used = {"local", "databricks"} if kind == "platform" else set()
    used |= {getattr(load_run(run).chosen, kind) for run in available("run")}
    assert set(available(kind)) <= used


# ------------------------------------------------------------------------------------------------ README


def test_the_readme_tree_is_the_real_one() -> None:
    named = set(tree_paths((ROOT / "README.md").read_text()))
    assert {path for path in named if not (ROOT / path).exists()} == set()
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False).stdout.split()
    folders = {path.partition("/")[0] + "/" for path in listed if "/" in path}
    assert {folder for folder in folders if folder not in named} == set()


def tree_paths(readme: str) -> Iterator[str]:
    """Paths that the README's annotated tree names: the block whose lines begin with paths, two spaces a level."""
    block = next(
        (b for b in re.findall(r"^```\w*\n(.*?)^```", readme, re.M | re.S) if re.search(r"^vlm/\s", b, re.M)), ""
    )
    assert block, "README.md has no annotated tree"
    parents: list[str] = []
    for line in filter(str.strip, block.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        head, _, note = line.strip().partition("  ")
        parents[depth:] = []
        paths = ["".join(parents) + name for name in head.split()]
        yield from paths
        if head.endswith("/"):
            parents.append(head.split()[-1])
            # Files named in a folder's annotation are promises too.
            yield from ("".join(parents) + name for name in re.findall(r"(?<!\S)[a-z_]+\.(?:py|md|yml)(?!\S)", note))
