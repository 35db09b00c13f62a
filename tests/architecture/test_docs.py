"""Tests that the commands, options, config keys and links in the documentation exist."""

from __future__ import annotations

import itertools
import json
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from jobs.cli import app
from pipelines.config import load_run
from pipelines.errors import ConfigError
from pipelines.formats.tables import TABLES

ROOT = Path(__file__).parents[2]
REFERENCE = runpy.run_path(str(ROOT / ".ci" / "reference.py"), run_name="reference")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
APP = typer.main.get_command(app)
COMMANDS = APP.commands  # type: ignore[attr-defined]


def shown(page: Path) -> Iterator[list[str]]:
    """Yield each `lakesight` command in the code blocks and in the running text of a page, as a list of words."""
    return shown_in(page.read_text())


def shown_in(text: str) -> Iterator[list[str]]:
    """Yield each `lakesight` command in the code blocks and in the running text of a Markdown text."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.M | re.S)
    spans = re.findall(r"`(lakesight [^`\n]+)`", text)
    lines = [line.strip() for block in blocks for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
    for line in [*lines, *spans]:
        if line.startswith("lakesight "):
            # In a code block, two spaces or a hash separate a command from its explanation.
            yield shlex.split(re.split(r"\s{2,}|\s#", line)[0])


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_on_a_page_exists_with_its_options(page: Path) -> None:
    for words in shown(page):
        assert words[1] in COMMANDS or words[1].startswith("-"), words
        parameters = APP.params if words[1].startswith("-") else COMMANDS[words[1]].params
        options = {option for each in parameters for option in (*each.opts, *each.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= {*options, "--help"}, words


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_config_key_on_a_page_exists(page: Path) -> None:
    text = page.read_text()
    keys = {
        *re.findall(r"--set '?([a-z_.]+)=", text),
        *re.findall(r"`((?:model|data|train|platform)\.(?!safetensors)[a-z_.]+)", text),
    }
    assert {key: found for key in keys if "unknown key" in (found := problems_with(key))} == {}


def problems_with(key: str) -> str:
    """Set one key of a run config to `x`, and return the problems in the config error (an empty text if there is no
    error).
    """
    platform = "databricks" if re.match(r"platform\.(catalog|schema|volume|experiment)", key) else "local"
    try:
        load_run("demo", platform=platform, overrides=[f"{key}=x"])
    except ConfigError as error:
        return error.got
    return ""


def yaml_files() -> Iterator[tuple[str, str, str]]:
    """For each run or data config that a page shows as a file in conf/, yield the kind, the name and the content."""
    for page in PAGES:
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.M | re.S):
            named = re.match(r"# conf/(run|data)/(\w+)\.yml\n", block)
            if named:
                yield named[1], named[2], block


@pytest.mark.parametrize(("kind", "name", "content"), yaml_files())
def test_every_run_and_data_config_on_a_page_is_valid(
    kind: str, name: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf" / kind).mkdir(parents=True)
    (tmp_path / "conf" / kind / f"{name}.yml").write_text(content)
    monkeypatch.chdir(tmp_path)
    if kind == "data":
        run = f"{{model: nano, data: {name}, train: demo}}"
        (tmp_path / "conf" / "run").mkdir()
        (tmp_path / "conf" / "run" / "shown.yml").write_text(run)
    assert load_run(name if kind == "run" else "shown").chosen.data == name
    assert len(content.splitlines()) <= 10, "the README promises one YAML file of at most ten lines"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_line_of_running_text_is_longer_than_120_characters(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("|", "<"))]
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_between_pages_exists(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = {link for link in links if "://" not in link and not (page.parent / link).exists()}
    assert missing == set()


def test_the_changelog_has_the_version_of_the_project_and_no_later_version() -> None:
    released = re.findall(r"^## (\d\S*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert released[0] == project["version"]


def test_every_test_that_a_page_names_exists() -> None:
    """A page can mention a test as `test_file.py`, `test_name` or `test_file.py::test_name`."""
    files = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    named = {
        found
        for page in PAGES
        for found in re.findall(r"`(test_\w+\.py)?(?:::)?(test_\w+)?`", page.read_text(encoding="utf-8"))
        if any(found)
    }
    assert {("test_killed.py", ""), ("test_ui.py", "")} <= {(file, "") for file, _ in named}
    assert [
        (file, name)
        for file, name in named
        if not any(f"def {name}" in text for each, text in files.items() if file in ("", each))
    ] == []


def test_every_statement_in_the_security_docs_names_its_test() -> None:
    statements = (ROOT / "docs" / "security.md").read_text().partition("## Each statement and its test")[2]
    rows = [line for line in statements.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    assert [row for row in rows if not re.search(r"\| `test_\w+\.py::test_\w+` \|$", row)] == []


# ------------------------------------------------------------------------------------------------ the reference


@pytest.fixture(scope="module")
def rendered() -> str:
    text: str = REFERENCE["render"]()
    return text


def test_the_reference_page_equals_the_page_that_is_generated_from_the_code(rendered: str) -> None:
    assert REFERENCE["PAGE"].read_text(encoding="utf-8") == rendered, "run: python .ci/reference.py"


def test_the_reference_lists_every_command_and_column_and_explains_every_key(rendered: str) -> None:
    titles = set(re.findall(r"^### (.*)$", rendered, re.M))
    assert {f"lakesight {name}" for name in COMMANDS} | {f"Table {table.name}" for table in TABLES} <= titles
    assert [column for table in TABLES for column in table.names if f"| `{column}` |" not in rendered] == []
    assert re.findall(r"^\|.*\| +\|$", rendered, re.M) == [], "a key or column without a meaning"
    assert "| `steps` | integer (> 0) |" in rendered


@pytest.mark.parametrize("page", ["docs/models.md", "docs/learn/07_frozen.ipynb"])
def test_the_first_training_after_an_import_of_two_parts_trains_only_the_random_projector(page: str) -> None:
    text = (ROOT / page).read_text()
    if page.endswith(".ipynb"):
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    commands = list(shown_in(text))
    imported = next(i for i, words in enumerate(commands) if words[1] == "import-weights" and "--encoder" in words)
    words = next(words for words in commands[imported:] if words[1] == "train")
    overrides = [after for before, after in itertools.pairwise(words) if before == "--set"]
    train = load_run("seemore_vit_gpt2", overrides=overrides).train
    assert train.start_from
    assert [list(stage.rates) for stage in train.stages] == [["projector.*"]]
