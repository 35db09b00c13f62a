"""File with the generation settings of all runs whose folder names begin with the same run name. A command reads this
file instead of the run.json of each run."""

from __future__ import annotations

import logging
from glob import escape
from pathlib import Path

from pipelines.errors import UserError
from pipelines.formats.run_folder import RunFolder, read_json, write_json
from vlm.config import Config, GenerationConfig

log = logging.getLogger(__name__)


class GenerationsFile(Config):
    """runs/NAME.generations.json: generation settings of the runs whose folder names begin with `NAME-`. The file may
    be removed at any time.

    Attributes:
        folders: names of the run folders whose run.json has been read.
        settings: all different generation settings in the run.json files of these folders.
    """

    folders: tuple[str, ...] = ()
    settings: tuple[GenerationConfig, ...] = ()


def read_generations(runs: Path, name: str) -> tuple[GenerationConfig, ...]:
    """Return all different generation settings of the runs whose folder names begin with `name` and a hyphen.

    Only the run.json of new runs is read.

    Folders of other programs and of incompatible versions are left out.

    Args:
        runs: folder that contains the run folders.
        name: name of the run config, with which the names of the run folders begin.
    """
    path = runs / f"{name}.generations.json"
    known = _read_file(path)
    read, settings = list(known.folders), list(known.settings)
    names = {folder.name for folder in runs.glob(f"{escape(name)}-*")}
    for folder in sorted(names - set(known.folders)):
        try:
            generation = RunFolder(runs / folder).read_run().config.model.generation
        except (UserError, OSError):
            continue
        read.append(folder)
        if generation not in settings:
            settings.append(generation)
    if len(read) > len(known.folders):
        try:
            write_json(path, GenerationsFile(folders=tuple(read), settings=tuple(settings)))
        except OSError as error:
            log.info("each run.json will be read again next time, because %s could not be written: %s", path, error)
    return tuple(settings)


def _read_file(path: Path) -> GenerationsFile:
    """Return the content of the file, or no settings if it is missing or has an unknown format."""
    try:
        return read_json(path, GenerationsFile)
    except UserError:
        return GenerationsFile()
