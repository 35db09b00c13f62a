"""Tests that `lakesight serve` serves a registered model version, which captions base64 pictures over REST."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError

import pytest
from model_server import ask, load, picture_texts, register_random, serve_command, served
from open_sockets import free_port
from tiny_runs import tiny_run

from pipelines.config import LocalPlatformConfig
from pipelines.platform import Platform, local
from pipelines.tracking import registry
from pipelines.tracking.download import download
from pipelines.worker.caption import load_captioner

CONFIG = tiny_run().model_copy(update={"name": "birds.v2"})


pytestmark = pytest.mark.xdist_group("serving")  # all tests share one model version


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A local platform with a new home folder and a new model registry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAKESIGHT_HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield local(LocalPlatformConfig())


@pytest.fixture(scope="module")
def version(laptop: Platform, tmp_path_factory: pytest.TempPathFactory) -> registry.ModelVersion:
    return register_random(laptop, tmp_path_factory.mktemp("registered"), CONFIG)


@pytest.mark.matrix
def test_a_served_version_captions_base64_pictures_over_rest_from_many_clients_at_once(
    laptop: Platform, version: registry.ModelVersion, tmp_path: Path
) -> None:
    encoded = picture_texts()[0]
    captioner = load_captioner(str(download(laptop, version).folder))
    (expected,) = captioner.caption([base64.b64decode(encoded)], [""], **CONFIG.model.generation.model_dump())
    good = {"caption": expected.caption, "error": None}
    with served(laptop, version, tmp_path) as address:
        assert ask(address, ["image"], [[encoded]]) == [good]
        first, second, third = ask(address, ["image"], [[encoded], [f"data:image/png;base64,{encoded}"], ["%%%"]])
        assert first == second == good
        assert third["caption"] is None
        assert third["error"].startswith("bad_base64")
        (answer,) = ask(address, ["image", "prompt"], [[encoded, "what"]])
        assert answer["error"] is None
        for header, value in (("Host", "evil.example"), ("Origin", "http://evil.example")):
            with pytest.raises(HTTPError, match=r"HTTP Error 40[03]"):
                ask(address, ["image"], [[encoded]], **{header: value})
        assert ask(address, ["image"], [[encoded]], Origin=address.removesuffix("/invocations")) == [good]
        assert len(load(address, requests=60, clients=4)) == 60  # `bench_serving.py` sends more requests


def test_a_loaded_model_version_runs_the_code_that_was_registered_with_the_version(
    laptop: Platform, version: registry.ModelVersion, tmp_path: Path
) -> None:
    """Although our packages are installed for this test, the model version must import the copies that it contains."""
    script = (
        f"import mlflow; mlflow.pyfunc.load_model('models:/{version.name}/1', dst_path=r'{tmp_path}')\n"
        "import sys; print([sys.modules[name].__file__ for name in ('vlm.model', 'pipelines.worker.caption')])"
    )
    environment = os.environ | {"MLFLOW_TRACKING_URI": laptop.tracking_uri}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(tmp_path)) == 2, done.stdout


@pytest.mark.matrix
def test_a_version_whose_code_was_changed_after_its_registration_is_not_served(
    laptop: Platform, version: registry.ModelVersion, tmp_path: Path
) -> None:
    [code] = (laptop.root / "mlartifacts").rglob("code/vlm/__init__.py")
    registered = code.read_text()
    code.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n{registered}")
    command, environment = serve_command(laptop, version, tmp_path, free_port())
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    finally:
        code.write_text(registered)
    assert done.returncode == 1, done.stderr
    assert "differ from the files that were registered" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "executed").exists()
