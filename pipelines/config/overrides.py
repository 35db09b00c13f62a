"""Overrides of settings, such as `a.b=c`, from the option --set of a command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.config.problems import config_error
from vlm.config.yaml_file import YamlProblem, parse_yaml
from vlm.errors import did_you_mean


def apply_override(slices: dict[str, Any], override: str, problems: list[str]) -> None:
    """Set the value of one override in nested dicts. If this is impossible, add a message to `problems`."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        problems.append(f"--set {override}: expected KEY=VALUE, such as train.steps=500")
        return
    if keys[0] not in slices:
        problems.append(f"{path}: unknown key {keys[0]!r}{did_you_mean(keys[0], slices)}")
        return
    node = slices
    for key in keys[:-1]:
        child = node.get(key)
        if not isinstance(child, dict):
            child = node[key] = {}
        node = child
    structured = text.strip().startswith(("[", "{")) or text.strip() in ("null", "~")
    try:
        node[keys[-1]] = parse_yaml(text) if structured else text
    except YamlProblem:
        problems.append(f"{path}: {text!r} is not a valid YAML list or mapping")


def model_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the values of overrides `model.a.b=c` as a nested dict, without the key `model`.

    Raises:
        ConfigError: an override is not `KEY=VALUE`, or its value is not valid YAML.
    """
    problems: list[str] = []
    slices: dict[str, Any] = {"model": {}}
    for override in overrides:
        if override.partition("=")[0].strip().split(".")[0] == "model":
            apply_override(slices, override, problems)
    if problems:
        raise config_error(problems, "--set")
    return dict(slices["model"])
