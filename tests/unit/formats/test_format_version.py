"""Tests that every command refuses a home folder of a newer release, and reads a home folder of an earlier release."""

from __future__ import annotations

from pathlib import Path

import pytest
from deltalake import DeltaTable
from local_platforms import open_local

from jobs.common import open_job
from jobs.table_files import open_table
from pipelines.errors import UserError
from pipelines.formats.format_version import FILE, FORMAT, PROPERTY, read_home_format, write_home_format
from pipelines.formats.tables import DECISIONS

NEWER = rf"a newer release of Lakesight wrote this data.*format {FORMAT + 1}; this release reads formats up to {FORMAT}"


def test_a_home_folder_of_a_newer_release_is_refused_by_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_local(monkeypatch, tmp_path)
    for written in (None, FORMAT):
        if written is not None:
            write_home_format(tmp_path, written)
        with open_job("demo", "local", None, as_json=True):
            assert read_home_format(tmp_path) == (written or 0)
    write_home_format(tmp_path, FORMAT + 1)
    with pytest.raises(UserError, match=NEWER), open_job("demo", "local", None, as_json=True):
        pass
    (tmp_path / FILE).write_bytes(b"\xff")
    with pytest.raises(UserError, match="the format of the home folder cannot be read"):
        read_home_format(tmp_path)


def test_lakesight_show_refuses_a_table_of_a_newer_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_local(monkeypatch, tmp_path)
    for number in (FORMAT, FORMAT + 1):
        folder = tmp_path / "warehouse" / f"table{number}"
        properties = {PROPERTY: str(number)}
        DeltaTable.create(folder, DECISIONS.arrow_schema, configuration=properties, raise_if_key_not_exists=False)
    with open_job("demo", "local", None, as_json=True) as job:
        assert open_table(job, f"table{FORMAT}", None).version() == 0
        with pytest.raises(UserError, match=NEWER):
            open_table(job, f"table{FORMAT + 1}", None)
