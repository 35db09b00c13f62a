"""Tests of the sizes of files, functions and folders, of circular imports, and of the folder tree in the README."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
MAX_DRIVER_ENTRIES, MAX_MODULES = 9, 14
CODE = sorted(file for folder in ("vlm", "pipelines", "jobs", "tests") for file in (ROOT / folder).rglob("*.py"))
PACKAGES = [file.parent for file in CODE if file.name == "__init__.py"]
LIBRARIES = [folder for folder in PACKAGES if folder != ROOT / "jobs"]


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


# ------------------------------------------------------------------------------------------------ size


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {relative(file): len(file.read_text().splitlines()) for file in CODE}
    assert {file: count for file, count in lengths.items() if count >= MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_60_lines() -> None:
    long = [
        f"{relative(file)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for file in CODE
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno
        and node.end_lineno - node.lineno + 1 >= MAX_FUNCTION_LINES
    ]
    assert long == []


def test_the_driver_package_has_at_most_nine_modules_and_folders() -> None:
    entries = sorted(path.name for path in (ROOT / "pipelines/driver").iterdir() if path.name != "__pycache__")
    assert len(entries) <= MAX_DRIVER_ENTRIES, entries


def test_no_folder_has_more_than_fourteen_modules() -> None:
    modules = {relative(folder): {*folder.glob("*.py")} - {folder / "__init__.py"} for folder in LIBRARIES}
    assert {folder: len(files) for folder, files in modules.items() if len(files) > MAX_MODULES} == {}


def test_no_two_test_files_have_the_same_name() -> None:
    """Test folders are not packages, so pytest imports test files by name and refuses two files with the same name."""
    files = sorted(file for file in (ROOT / "tests").rglob("*.py") if file.name != "conftest.py")
    counts = Counter(file.name for file in files)
    assert [relative(file) for file in files if counts[file.name] > 1] == []


# ------------------------------------------------------------------------------------------------ packages


@cache
def import_graph() -> grimp.ImportGraph:
    """Build the import graph of `vlm` and `pipelines`, without imports that only type checkers see."""
    return grimp.build_graph("vlm", "pipelines", exclude_type_checking_imports=True, cache_dir=None)


@pytest.mark.parametrize("folder", LIBRARIES, ids=relative)
def test_modules_and_folders_of_a_package_have_no_circular_imports(folder: Path) -> None:
    """In this test, a subfolder with all of its files counts as one module."""
    imports = import_graph().nominate_cycle_breakers(relative(folder).replace("/", "."))
    assert sorted(imports) == [], "without these imports there would be no circle"


@pytest.mark.parametrize("folder", PACKAGES, ids=relative)
def test_every_package_has_a_docstring_of_two_or_three_sentences(folder: Path) -> None:
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    sentences = re.findall(r"[.!?](?=\s|$)", docstring)
    assert 2 <= len(sentences) <= 3, docstring


# ------------------------------------------------------------------------------------------------ text


def test_code_is_ascii_and_contains_no_path_of_a_home_folder() -> None:
    for file in CODE:
        text = file.read_text()
        assert text.isascii(), relative(file)
        assert not re.search(r"/(home|Users|work|root)/\w", text), relative(file)


def test_the_folder_tree_in_the_readme_matches_the_repository() -> None:
    named = set(tree_paths((ROOT / "README.md").read_text()))
    assert {path for path in named if not (ROOT / path).exists()} == set()
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False).stdout.split()
    folders = {path.partition("/")[0] + "/" for path in listed if "/" in path}
    assert {folder for folder in folders if folder not in named} == set()


def tree_paths(readme: str) -> Iterator[str]:
    """Yield the paths in the README's folder tree.

    The tree is the code block with a line `vlm/`. Each level is indented by two more spaces than the level above.
    """
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
            # The explanation next to a folder may list files. Yield these files too.
            yield from ("".join(parents) + name for name in re.findall(r"(?<!\S)[a-z_]+\.(?:py|md|yml)(?!\S)", note))
