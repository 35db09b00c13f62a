"""The file `unregistered`, which records what a `train` command registers after the training."""

from __future__ import annotations

from pipelines.config.train import Register
from pipelines.formats.run_folder import RunFolder, read_json
from vlm.config import Config, GenerationConfig


class Unregistered(Config):
    """Checkpoint and generation settings that the last `train` command of a run registers after the training."""

    checkpoint: Register
    generation: GenerationConfig


def read_unregistered(run: RunFolder) -> Unregistered:
    """Read the file `unregistered` of a run.

    Lakesight 0.1.0 wrote an empty file. If the file is empty, the settings in run.json are returned.

    Raises:
        UserError: the file is missing or damaged.
    """
    if run.unregistered.exists() and not run.unregistered.stat().st_size:
        config = run.read_run().config
        return Unregistered(checkpoint=config.train.register_, generation=config.model.generation)
    return read_json(run.unregistered, Unregistered)
