"""Function that makes a Spark session refuse settings, as serverless compute of Databricks does."""

from __future__ import annotations

from typing import NoReturn

import pytest
from pyspark.errors import AnalysisException

REFUSED = "spark.task.cpus"
"""Setting that Lakesight reads and that serverless compute does not return. Other settings can be read, because PySpark
itself reads some of them.
"""


def refuse_settings(patch: pytest.MonkeyPatch, settings: type) -> None:
    """Make a class of Spark settings refuse all changes, and refuse to return the setting REFUSED.

    Args:
        patch: pytest's monkeypatch, which undoes the change at the end of its context.
        settings: `pyspark.sql.conf.RuntimeConfig`, or `pyspark.sql.connect.conf.RuntimeConf`.
    """
    usual_get = settings.get  # type: ignore[attr-defined]

    def refuse(_: object, key: str, *values: object) -> NoReturn:
        raise AnalysisException(f"[CONFIG_NOT_AVAILABLE] Configuration {key} is not available.")

    def get(conf: object, key: str, *default: object) -> object:
        if key == REFUSED:
            refuse(conf, key)
        return usual_get(conf, key, *default)

    for name, method in (("get", get), ("set", refuse), ("unset", refuse)):
        patch.setattr(settings, name, method)
