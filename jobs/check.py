"""Result of one check of `lakesight doctor`."""

from __future__ import annotations

from typing import Literal

from vlm.config import Config


class DoctorCheck(Config):
    """Result of one check of a machine or workspace. The field `fix` is empty if nothing needs a fix."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""
