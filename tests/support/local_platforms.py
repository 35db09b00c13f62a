"""Helper that opens a local platform with a separate home folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.config import LocalPlatformConfig
from pipelines.platform import Platform, local


def open_local(
    patch: pytest.MonkeyPatch, home: Path, config: LocalPlatformConfig | None = None, database: Path | None = None
) -> Platform:
    """Open a local platform in a home folder, without a tracking server.

    Args:
        patch: pytest's monkeypatch, which restores the environment variables at the end of the test.
        home: home folder.
        config: settings of the platform, or None for the default settings.
        database: MLflow database to copy into the home folder, or None to copy none.
    """
    patch.setenv("LAKESIGHT_HOME", str(home))
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    platform = local(config or LocalPlatformConfig())
    if database:
        shutil.copy(database, platform.root / "mlflow.db")
    return platform
