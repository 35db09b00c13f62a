"""Generation settings of a model (`model.generation`) on the command line.

The commands `ask`, `caption`, `evaluate` and `serve` have one option for each generation setting. Commands that are not
in GENERATION_COMMANDS refuse overrides of these settings.
"""

from __future__ import annotations

import functools
import inspect
import json
import shlex
from collections.abc import Callable
from typing import Annotated, Any

import typer

from pipelines.errors import UserError

GENERATION = "model.generation"
OPTIONS: dict[str, tuple[Any, str, str]] = {
    "max_new_tokens": (int, "N", "Largest number of tokens of an answer."),
    "temperature": (float, "T", "Temperature of sampling; 0 chooses the most likely tokens."),
    "top_k": (int, "N", "Sample from this number of most likely tokens."),
    "top_p": (float, "P", "Sample from the most likely tokens with this total probability."),
    "min_p": (float, "P", "Sample from tokens with at least this share of the highest probability."),
    "repetition_penalty": (float, "X", "Penalty on tokens that occurred before; 1: no penalty."),
    "num_beams": (int, "N", "Number of beams of beam search."),
    "length_penalty": (float, "X", "Length penalty: with a value above 1, beam search prefers longer answers."),
    "stop": (list[str], "TEXT", "Text that ends an answer. Repeatable."),
    "seed": (int, "N", "Random seed of sampling."),
}
"""Dict from each setting of `vlm.config.GenerationConfig` to the type, placeholder and help text of its option."""

GENERATION_COMMANDS = (
    *("train", "evaluate", "compare", "promote", "caption", "pipeline", "demo", "ask", "serve"),
    *("config", "doctor", "import-weights"),
)
"""Commands that use, store, check or print generation settings. All other commands caption nothing, and refuse these
settings.
"""


def is_generation(override: str) -> bool:
    """Return whether an override `KEY=VALUE`, or a key, belongs to the generation settings."""
    key = override.partition("=")[0].strip()
    return key == GENERATION or key.startswith(f"{GENERATION}.")


def without_generation_settings(name: str, command: Callable[..., None]) -> Callable[..., None]:
    """Make a command refuse overrides of generation settings with a UserError, because the command would ignore
    them."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        if given := [override for override in kwargs.get("overrides") or () if is_generation(override)]:
            words = [word for override in given for word in ("--set", override)]
            options = shlex.join(["--run", kwargs["run"], *words])
            raise UserError(
                "this command captions nothing, so generation settings would have no effect",
                where=f"lakesight {name}",
                got=shlex.join(words),
                fix=f"leave them out here. `lakesight caption {options}` captions with these settings; `ask`, "
                f"`evaluate` and `serve` accept them too. `lakesight train {options}` registers a version with them",
            )
        command(*args, **kwargs)

    return run


def with_generation_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options to a command. If the user gives an option, it becomes the override `model.generation.NAME=VALUE`.

    The command must have a parameter `overrides`.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name, None) for name in OPTIONS}
        chosen = [f"{GENERATION}.{name}={_to_yaml(value)}" for name, value in given.items() if value is not None]
        command(*args, **kwargs | {"overrides": [*(kwargs.get("overrides") or ()), *chosen]})

    signature = inspect.signature(command, eval_str=True)
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                kind | None,
                typer.Option(f"--{name.replace('_', '-')}", help=text, metavar=metavar),
            ],
        )
        for name, (kind, metavar, text) in OPTIONS.items()
    ]
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *options]
    )
    return run


def _to_yaml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
