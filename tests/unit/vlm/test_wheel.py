"""Test that the wheel captions a picture with its base dependencies and torch, without pyspark and mlflow."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from PIL import Image
from tiny_models import tiny_model, tiny_pixels

from vlm.captioner import Captioner

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.matrix


def required(requirements: list[str], extra: str = "") -> Iterator[str]:
    """Yield the names of the required distributions whose environment markers apply to this machine."""
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement.name


def all_required(names: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """Return the named distributions and all their dependencies, as installed in this environment."""
    found: dict[str, importlib.metadata.Distribution] = {}
    while names:
        name = names.pop()
        if name not in found:
            found[name] = importlib.metadata.distribution(name)
            names += required(found[name].requires or [])
    return found


def link(distribution: importlib.metadata.Distribution, folder: Path) -> None:
    """Link the installed files of a distribution into another environment."""
    for file in distribution.files or ():
        top = file.parts[0]
        if top != ".." and not (folder / top).is_symlink():
            (folder / top).symlink_to(Path(str(distribution.locate_file(top))))


def run(*command: str | Path, folder: Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_code_lines_of_the_readme_run_from_the_wheel_without_pyspark_and_mlflow(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path / "dist", ROOT, folder=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", folder=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        site,
        wheel,
        folder=tmp_path,
    )
    (metadata,) = site.glob("lakesight-*.dist-info")
    wanted = importlib.metadata.Distribution.at(metadata).requires or []
    distributions = all_required([*required(wanted), *required(wanted, "torch")])
    assert "torch" in distributions
    assert not {"pyspark", "mlflow", "delta-spark", "mlflow-skinny"} & set(distributions)
    for distribution in distributions.values():
        link(distribution, site)

    (lines,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    captioner = Captioner(*tiny_model("plain"))
    captioner.save(tmp_path / "checkpoint")
    picture = Image.fromarray(tiny_pixels(1)[0].numpy())
    picture.save(tmp_path / "cat.png")
    check = "\nimport sys; assert not {'pyspark', 'mlflow'} & set(sys.modules); print(); print(vlm.__file__)"
    printed = run(python, "-I", "-c", lines + check, folder=tmp_path)
    assert printed.startswith(f"{captioner.caption([picture], max_new_tokens=8)[0].caption}\n")
    assert printed.endswith(f"{site / 'vlm' / '__init__.py'}\n")
    assert (site / "vlm" / "py.typed").is_file()
    build = "import vlm; print(vlm.build('nano_tiny').model.config.image.size)"
    assert run(python, "-I", "-c", build, folder=tmp_path) == "32\n"
    run(python, "-I", "-c", "import importlib.util as u; assert not u.find_spec('pyspark')", folder=tmp_path)
