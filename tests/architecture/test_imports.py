"""Tests of imports: import-linter checks the import contracts, and a new interpreter loads no forbidden library."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "pyspark", "delta", "deltalake", "mlflow"}

# Dict from each group of files to two values: the patterns of the files, and the heavy libraries that an import of
# these files may load. One process imports all files of a group, because importing torch takes seconds.
LOADED = {
    "nothing": (
        [
            *("vlm/__init__.py", "vlm/errors.py", "vlm/files.py", "vlm/image.py"),
            *("vlm/config/*.py", "vlm/picture/*.py", "vlm/text/*.py"),
            "pipelines/*.py",
            *(f"pipelines/{name}/*.py" for name in ("config", "formats", "pages", "platform")),
            *("pipelines/executor/**/*.py", "jobs/*.py"),
        ],
        set(),
    ),
    "torch": (["vlm/**/*.py", "pipelines/worker/**/*.py"], {"torch"}),
    "Spark and Delta": (["pipelines/driver/**/*.py"], {"pyspark", "delta", "deltalake"}),
    "deltalake": (["pipelines/review/*.py"], {"deltalake"}),
}

# Dict from the id of each import contract in pyproject.toml to an example that would break the contract: a file, and an
# import statement in this file.
BREACHES = {
    "layers": ("pipelines/formats/tables.py", "import pipelines.driver.delta.tables"),
    "stages": ("pipelines/driver/shard/run.py", "import pipelines.driver.ingest.run"),
    "model": ("vlm/layers/norm.py", "import vlm.model"),
    "library": ("vlm/training/optim.py", "import pyspark"),
    "light": ("vlm/text/bpe.py", "import torch"),
    "driver": ("pipelines/driver/evaluate/gate.py", "import torch"),
    "executor": ("pipelines/executor/caption.py", "import pyspark"),
    "worker": ("pipelines/worker/data/order.py", "import mlflow"),
    "review": ("pipelines/review/server.py", "import pyspark"),
    "tracking": ("jobs/common.py", "import mlflow"),
}


def modules(patterns: list[str]) -> list[str]:
    """Return the dotted names of the modules whose files match the patterns."""
    files = sorted({file for pattern in patterns for file in ROOT.glob(pattern)})
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    assert names, patterns
    return names


@pytest.mark.parametrize("libraries", LOADED)
def test_importing_a_package_loads_no_library_that_the_process_of_this_package_lacks(libraries: str) -> None:
    patterns, allowed = LOADED[libraries]
    code = f"import sys, {', '.join(modules(patterns))}; print(*sorted({HEAVY - allowed!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_help_and_config_commands_load_no_heavy_library() -> None:
    code = (
        "import sys; sys.argv = ['lakesight', *sys.argv[1:]]; from jobs.cli import main; main(); "
        f"print('loaded:', *sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    for arguments in (["config", "models"], ["config", "--run", "seemore", "--json"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "loaded:"), done.stderr


def test_every_import_contract_is_kept() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("contract", BREACHES)
def test_an_import_that_breaks_an_import_contract_is_reported(contract: str, tmp_path: Path) -> None:
    for name in ("vlm", "pipelines", "jobs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file, line = BREACHES[contract]
    with (tmp_path / file).open("a") as module:
        module.write(f"\n{line}\n")
    done = lint(tmp_path, contract)
    assert (done.returncode, "0 kept, 1 broken" in done.stdout) == (1, True), done.stdout


def lint(folder: Path, *contracts: str) -> subprocess.CompletedProcess[str]:
    """Check the packages in a folder with import-linter, against the given contracts or against all contracts."""
    code = (
        "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports; "
        f"sys.exit(lint_imports(limit_to_contracts={contracts!r}, no_cache=True))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
