"""Check that a run trains the parameters of an imported model that still have random weights.

An import gives random weights to the parameters that no published folder contains, such as the projector between a
published encoder and a published decoder. If a run freezes such a parameter, the run trains the rest of the model to
read random features.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ValidationError

from pipelines.config import TrainConfig
from pipelines.errors import UserError
from vlm.config import read_error_message
from vlm.files import IMPORT_RECORD

BLOCKS = re.compile(r"\{(\d+)(?:\.\.(\d+)|((?:,\d+)*))\}")
"""Block numbers in a name of an import report, such as `{0..11}` or `{0,2}` (`vlm.weights.plan.format_blocks`)."""


class _Report(BaseModel):
    fresh: tuple[str, ...]


class _Record(BaseModel):
    report: _Report | None = None


def require_training_of_random_parameters(folder: Path, settings: TrainConfig) -> None:
    """Check that a run freezes no parameter that an import has initialised at random.

    An adapter freezes all parameters. Stages freeze a parameter that no stage trains. A folder that no import has
    written has no random parameters.

    Raises:
        UserError: the run freezes such a parameter, or the record of the import cannot be read.
    """
    if not (folder / IMPORT_RECORD).is_file() or not (settings.adapter or settings.stages):
        return
    try:
        record = _Record.model_validate_json((folder / IMPORT_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise UserError(
            "the record of the import cannot be read",
            where=str(folder / IMPORT_RECORD),
            got=read_error_message(error),
            fix="import the weights again into a new folder with `lakesight import-weights`",
        ) from None
    frozen = [name for name in (record.report.fresh if record.report else ()) if _is_frozen(name, settings)]
    if frozen:
        raise UserError(
            "the run would freeze parameters that have random weights",
            where=f"train.start_from: {folder}",
            got=f"train.{'adapter' if settings.adapter else 'stages'} does not train {', '.join(frozen)}",
            fix="train these parameters in a stage of train.stages, as in the first stage of conf/train/staged.yml; "
            "an adapter can then start from the last checkpoint of that run",
        )


def _is_frozen(name: str, settings: TrainConfig) -> bool:
    """Return whether the run freezes a parameter of an import report, in at least one of the listed blocks."""
    if settings.adapter:
        return True
    return any(not any(_rate(each, stage.rates) for stage in settings.stages) for each in _split_blocks(name))


def _rate(name: str, rates: dict[str, float]) -> float:
    """Return the learning rate of a parameter: the learning rate of the first pattern that matches the whole name."""
    return next((lr for pattern, lr in rates.items() if re.fullmatch(pattern, name)), 0.0)


def _split_blocks(name: str) -> Iterator[str]:
    """Yield the name of each parameter that a name of an import report, such as `blocks.{0,2}.norm`, stands for."""
    match = BLOCKS.search(name)
    if match is None:
        yield name
        return
    first, last, others = match.groups()
    numbers = range(int(first), int(last) + 1) if last else [first, *others.split(",")[1:]]
    for number in numbers:
        yield f"{name[: match.start()]}{number}{name[match.end() :]}"
