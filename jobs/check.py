"""Result of one check of `lakesight doctor`."""

from __future__ import annotations

from typing import Literal

from vlm.config import Config


class DoctorCheck(Config):
    """Result of one check of a machine or workspace. Field `fix` is empty if there is nothing to fix."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""
