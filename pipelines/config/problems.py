"""Functions that make one error from all problems of a configuration. `vlm.config.problems` describes each problem."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ValidationError

from vlm.config.problems import describe
from vlm.errors import ConfigError


def config_error(problems: Iterable[str], where: str) -> ConfigError:
    """Make one error that lists every distinct problem. `where` names the run or model."""
    listed = list(dict.fromkeys(problems))
    noun = "problem" if len(listed) == 1 else "problems"
    return ConfigError(
        f"the configuration has {len(listed)} {noun}",
        where=where,
        got=listed,
        fix="correct the YAML file or the --set option; `lakesight config --run demo` prints every key",
    )


def validation_error(error: ValidationError, root: type[BaseModel], where: str) -> ConfigError:
    """Turn pydantic's error about the class `root` into one ConfigError."""
    return config_error((text for text, _ in describe(error, root)), where)
