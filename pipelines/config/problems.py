"""Functions that turn configuration errors into sentences with the setting's path, the problem, and a similar valid
name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from vlm.errors import ConfigError, did_you_mean


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
    """Turn pydantic's error about the model `root` into one ConfigError."""
    return config_error((text for text, _ in describe(error, root)), where)


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
            text = item["msg"].removeprefix("Value error, ")
            if not isinstance(item["input"], dict):
                text += f" (got {item['input']!r})"
        yield f"{path}: {text}" if path else text, path.partition(".")[0]


def _field_path(root: type[BaseModel], loc: Sequence[int | str]) -> tuple[str, list[str], list[type[BaseModel]]]:
    """Return the dotted path as the user wrote the path (without pydantic's union tags).

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
    """Return the value of the field `kind`, by which pydantic selects a model of a union, or None."""
    kind = model.model_fields.get("kind")
    return get_args(kind.annotation)[0] if kind else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the pydantic models that an annotation names, alone or in a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return [model for arg in get_args(annotation) for model in _models(arg)]
    return []
