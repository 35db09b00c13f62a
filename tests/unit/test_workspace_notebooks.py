"""Tests that the notebooks for a workspace are Databricks notebooks, and that the functions that they call exist."""

from __future__ import annotations

import ast
import inspect
import runpy
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from jobs.common import Job, open_notebook
from pipelines.config import load_run
from pipelines.formats.tables import TABLES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks" / "workspace"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.py"))
LEARN = runpy.run_path(str(ROOT / ".ci" / "learn.py"), run_name="learn")
JOB = {*dir(Job), *Job.__annotations__}
"""Names of all attributes of a job."""
SETTINGS = runpy.run_path(str(FOLDER / "notebook_settings.py"))


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the module and the name of each `from module import name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module != "notebook_settings":
            yield from ((str(node.module), each.name) for each in node.names)


def mistakes(code: str) -> Iterator[str]:
    """Yield the mistakes in a notebook's code.

    Mistakes are definitions, calls with wrong arguments, and names that do not exist: imported names, attributes of the
    job, and table names.
    """
    tree = ast.parse(code)
    found = {name: getattr(import_module(module), name, None) for module, name in imports(tree)}
    yield from (name for name, value in found.items() if value is None)
    for node in ast.walk(tree):
        text = ast.unparse(node)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield text
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "job" and node.attr not in JOB:
            yield text
        if isinstance(node, ast.Call) and not accepts(found.get(ast.unparse(node.func)), node):
            yield text


def accepts(function: object, call: ast.Call) -> bool:
    """Return whether a function accepts the arguments of a call. For other objects, return True.

    For a call of `job.platform.table`, return whether Lakesight has a table of this name.
    """
    if ast.unparse(call.func) == "job.platform.table":
        return ast.literal_eval(call.args[0]) in {table.name for table in TABLES}
    if inspect.isfunction(function):
        try:
            inspect.signature(function).bind(*call.args, **{str(each.arg): each for each in call.keywords})
        except TypeError:
            return False
    return True


def code_of(notebook: Path) -> str:
    cells = LEARN["read_cells"](notebook)
    assert cells[0].kind == "markdown"
    return "\n".join(cell.text for cell in cells if cell.kind == "code")


def test_the_notebooks_for_a_workspace_are_numbered_from_setup_to_monitoring() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{number:02d}" for number in range(7)]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda each: each.stem)
def test_the_notebook_has_the_format_of_databricks_and_calls_only_functions_that_exist(notebook: Path) -> None:
    assert list(mistakes(code_of(notebook))) == []


@pytest.mark.parametrize(
    "code",
    [
        "from jobs.train import run_training",
        "from jobs.evaluate import run_evaluate\nrun_evaluate(job)",
        "from jobs.caption import run_caption\nrun_caption(job, version=1)",
        "job.table('samples')",
        "spark.table(job.platform.table('sample'))",
        "def helper(): ...",
    ],
)
def test_a_wrong_import_call_attribute_or_table_name_in_a_notebook_is_found(code: str) -> None:
    assert len(list(mistakes(code))) == 1


def test_the_settings_of_the_notebooks_are_valid_on_a_laptop_and_in_a_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAKESIGHT_HOME", str(tmp_path))
    run, workspace, small = (SETTINGS[name] for name in ("RUN", "WORKSPACE", "SMALL"))
    assert open_notebook(run, workspace, small).config == load_run(run, overrides=small)
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "18.0")
    job = open_notebook(run, workspace, small)
    assert job.config.platform == load_run(run, platform="databricks", overrides=(*workspace, *small)).platform
    assert str(job.platform.root) == "/Volumes/main/lakesight/files"
