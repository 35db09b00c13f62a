"""Jobs of the Databricks bundle as a workspace receives them: all references are replaced by values."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
BUNDLE: dict[str, Any] = yaml.safe_load((ROOT / "databricks.yml").read_text())

RUN_IDS = itertools.count(1001)
"""Ids of the job runs. A workspace gives each job run a new id."""


def job_tasks(job: str, values: dict[str, str], parameters: dict[str, str]) -> list[list[str]]:
    """Return the parameters of each wheel task that runs in a new job run, in the order of the tasks.

    Args:
        job: key of the job.
        values: values of references, such as `resources.schemas.lakesight.name`. Without an entry, `var.run` has its
            value in target `dev`, and every other bundle variable has its default value or, without a default value,
            an empty text.
        parameters: values of job parameters in the job run. Every other job parameter has its default value.
    """
    settings = yaml.safe_load((ROOT / "jobs" / f"{job}.job.yml").read_text())["resources"]["jobs"][job]
    known = {f"var.{name}": str(variable.get("default", "")) for name, variable in BUNDLE["variables"].items()}
    known |= {"var.run": BUNDLE["targets"]["dev"]["variables"]["run"]} | values

    def resolve(text: str) -> str:
        return re.sub(r"\$\{([^}]+)\}", lambda found: known[found[1]], text)

    given = {
        f"parameters.{name}": value
        for name, value in (
            {entry["name"]: resolve(entry["default"]) for entry in settings["parameters"]} | parameters
        ).items()
    }
    given["run_id"] = str(next(RUN_IDS))

    def fill(text: str) -> str:
        return re.sub(r"\{\{job\.([\w.]+)\}\}", lambda found: given[found[1]], resolve(text))

    tasks = (
        task for task in settings["tasks"] if all(_is_run(need, settings, fill) for need in task.get("depends_on", []))
    )
    wheels = (task["python_wheel_task"]["parameters"] for task in tasks if "python_wheel_task" in task)
    return [[fill(text) for text in parameters] for parameters in wheels]


def _is_run(need: dict[str, str], settings: dict[str, Any], fill: Callable[[str], str]) -> bool:
    """Return whether an entry of `depends_on` lets a task run; the entry may require an outcome of a condition task."""
    if "outcome" not in need:
        return True
    (condition,) = (task["condition_task"] for task in settings["tasks"] if task["task_key"] == need["task_key"])
    assert condition["op"] == "EQUAL_TO"
    return str(fill(condition["left"]) == fill(condition["right"])).lower() == need["outcome"]
