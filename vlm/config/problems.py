"""Functions that turn pydantic's errors into sentences with the path, the problem and the value of a setting.

A sentence about an unknown name also suggests a similar valid name, if there is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from vlm.errors import did_you_mean

MAX_SHOWN = 100
"""Largest number of characters of a value that a sentence shows."""


def problem_text(problem: ErrorDetails) -> str:
    """Return the message of one pydantic problem. Limits have a short form (1e-100), and "list" replaces "tuple"."""
    text = problem["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
    for limit in (problem.get("ctx") or {}).values():
        if isinstance(limit, float):  # pydantic writes each digit of a limit such as 1e+300
            text = re.sub(r"\d{17,}(\.\d+)?|0\.0{9,}\d+", f"{limit:g}", text)
    return text


def describe(error: ValidationError, root: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Yield each pydantic problem as a sentence, together with the first element of the problem's path."""
    for item in error.errors():
        path, siblings, models = _field_path(root, item["loc"])
        last = str(item["loc"][-1]) if item["loc"] else ""
        if item["type"] == "extra_forbidden":
            text = f"unknown key{did_you_mean(last, siblings)}"
        elif item["type"] == "missing":
            text = "missing"
        elif item["type"] == "union_tag_not_found":
            text = f"kind is missing (one of {', '.join(str(_tag(model)) for model in models)})"
        elif item["type"] == "union_tag_invalid":
            tag = str(item["ctx"]["tag"])
            tags = [tag.strip(" '") for tag in str(item["ctx"]["expected_tags"]).split(",")]
            text = f"unknown kind {tag!r}{did_you_mean(tag, tags)} (one of {', '.join(tags)})"
        else:
            text = problem_text(item)
            if not isinstance(item["input"], dict | BaseModel):
                shown = repr(item["input"])
                text += f" (got {shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + '...'})"
        yield f"{path}: {text}" if path else text, path.partition(".")[0]


def _field_path(root: type[BaseModel], loc: Sequence[int | str]) -> tuple[str, list[str], list[type[BaseModel]]]:
    """Return the dotted path of a setting as in the user's config, without the union tags that pydantic adds.

    The second returned value lists the valid names for the last element of the path. The third returned value lists
    the config classes that the field at the path accepts.
    """
    candidates: list[type[BaseModel]] = [root]
    parts: list[str] = []
    siblings: list[str] = []
    for step in loc:
        tagged = [model for model in candidates if _tag(model) == step] if len(candidates) > 1 else []
        if tagged:
            candidates = tagged
            continue
        siblings = sorted({f.alias or n for model in candidates for n, f in model.model_fields.items()})
        parts.append(str(step))
        annotations = [
            f.annotation for model in candidates for n, f in model.model_fields.items() if step in (n, f.alias)
        ]
        candidates = [model for annotation in annotations for model in _models(annotation)]
    return ".".join(parts), siblings, candidates


def _tag(model: type[BaseModel]) -> str | None:
    """Return the value of the field `kind`, by which pydantic selects a model of a union, or None if the model has no
    field `kind`.
    """
    kind = model.model_fields.get("kind")
    return get_args(kind.annotation)[0] if kind else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the pydantic models that an annotation contains, alone or in a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return [model for arg in get_args(annotation) for model in _models(arg)]
    return []
