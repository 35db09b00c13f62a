"""Format versions of a home folder and of each table in the home folder. Data in a newer format is refused.

The version is stored in the file FILE of a home folder (or of the Volume on Databricks), and in the property PROPERTY
of each table. Data of Lakesight 0.1.0 has neither the file nor the property, and counts as format 0. This release reads
all formats up to FORMAT.

If earlier releases would misread or damage data in a new format, increase FORMAT, and add a step to
`pipelines.driver.delta.migrate`. A new nullable column or a new file needs no new format, because earlier releases
ignore new columns and files.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from pipelines.errors import UserError
from vlm.config import Config
from vlm.files import atomic_write

FORMAT = 1
PROPERTY = "lakesight.format"
"""Name of the property in which each table stores its format version."""
FILE = "format.json"
"""Name of the file in which a home folder stores its format version."""


class HomeFormat(Config):
    """Content of FILE."""

    format: int


def check_format(found: int, where: str) -> None:
    """Check that this release can read data in the format `found`.

    Raises:
        UserError: a newer release of Lakesight wrote the data.
    """
    if found > FORMAT:
        raise UserError(
            "a newer release of Lakesight wrote this data",
            where=where,
            got=f"format {found}; this release reads formats up to {FORMAT}",
            fix="install the newer release, or undo the migration with the newer release: lakesight migrate --undo",
        )


def check_home(root: Path) -> None:
    """Check that this release can read a home folder.

    Raises:
        UserError: a newer release of Lakesight wrote the folder, or its format cannot be read.
    """
    check_format(read_home_format(root), str(root))


def read_home_format(root: Path) -> int:
    """Return the format of a home folder.

    Raises:
        UserError: the file with the format is damaged.
    """
    path = root / FILE
    if not path.is_file():
        return 0
    try:
        return HomeFormat.model_validate_json(path.read_text(encoding="utf-8")).format
    except (ValidationError, UnicodeDecodeError) as error:
        raise UserError(
            "the format of the home folder cannot be read",
            where=str(path),
            got=str(error).splitlines()[0],
            fix=f'if this release of Lakesight wrote the folder, write {{"format": {FORMAT}}} into the file',
        ) from None


def write_home_format(root: Path, version: int) -> None:
    """Write the format of a home folder."""
    root.mkdir(parents=True, exist_ok=True)
    with atomic_write(root / FILE) as temporary:
        temporary.write_text(HomeFormat(format=version).model_dump_json(), encoding="utf-8")
