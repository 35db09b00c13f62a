"""Descriptions of runs, experiments and model versions in MLflow, as Markdown text with sections.

Each stage replaces its own sections and keeps all other text.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from urllib.parse import quote, urlencode

from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from pipelines.platform import Platform

logger = logging.getLogger(__name__)

NOTE = MLFLOW_RUN_NOTE
"""Name of the tag whose text MLflow shows as the description of a run or an experiment."""
KIND = "mlflow.experimentKind"
TRAINING_KIND = "custom_model_development"
"""Value of the tag KIND with which MLflow shows an experiment as model training, not as development of an agent."""
VIEW = "workflowType=machine_learning"
"""Query parameter that makes MLflow show its pages for model training."""
EVALUATION = "Evaluation of version "
"""Beginning of the headings of evaluations in the description of a run. The number of the version follows."""
MAX_NOTE_CHARS = 5000
"""Largest number of characters of a tag that all tracking servers accept."""


STAGES = {
    "ingest": "Ingests: one run for each ingest that changed a table. The metrics of a run count rows. The HTML page "
    "among the artifacts of a run shows accepted rows and refused rows.",
    "caption": "Captioning jobs: one run for each job that captioned pictures. The parameters of a run name the model "
    "version and the captioned table. The artifact `drift.json` of a run compares the captions with the evaluation "
    "of the model version.",
}
"""Dict from each stage that has a single MLflow experiment for all run configs to the experiment's description."""
MODEL_DESCRIPTION = (
    "Versions of a model that writes captions for pictures. The alias `champion` points to the version that captions "
    "tables. The alias `previous` points to the champion before the present champion. The alias `challenger` points to "
    "the version that `lakesight promote` checked last, unless this version is now the champion. The description of a "
    "version says how the version was trained, compares its figures with two baselines, and lists commands."
)


def describe_experiment(name: str) -> dict[str, str]:
    """Return the tags of an experiment: its kind and its description.

    Args:
        name: name of a stage in STAGES, or of a run config.
    """
    training = (
        f"Trainings of the run **{name}** (`conf/run/{name}.yml`). The name of a run lists the settings that "
        "differ from this file. The description of a run has the command that repeats the run."
    )
    return {KIND: TRAINING_KIND, NOTE: STAGES.get(name, training)}


def put_sections(note: str, sections: Mapping[str, str]) -> str:
    """Replace sections of a description, append new sections, and keep all other text.

    If the description becomes longer than MAX_NOTE_CHARS, remove the oldest evaluations that are not in `sections`. If
    the description is still too long, cut its end.

    Args:
        note: present description, which may be empty.
        sections: Markdown texts of the sections to write, by heading.
    """
    start = re.split(r"(?m)^### ", note)[0]
    bodies = read_sections(note) | {heading: body.strip() for heading, body in sections.items()}
    oldest = [heading for heading in bodies if heading.startswith(EVALUATION) and heading not in sections]
    while len(text := _join(start, bodies)) > MAX_NOTE_CHARS and oldest:
        del bodies[oldest[0]]
        logger.info("the description of the run is too long; removed its section: %s", oldest.pop(0))
    return text[:MAX_NOTE_CHARS]


def _join(start: str, bodies: Mapping[str, str]) -> str:
    texts = [start.strip(), *(f"### {heading}\n\n{body}" for heading, body in bodies.items())]
    return "\n\n".join(text for text in texts if text)


def read_sections(note: str) -> dict[str, str]:
    """Split a description into sections, and return the text of each section, by heading."""
    parts = (part.partition("\n") for part in re.split(r"(?m)^### ", note)[1:])
    return {heading.strip(): body.strip() for heading, _, body in parts}


def code_block(*commands: str) -> str:
    """Return a Markdown code block with the commands."""
    return "\n".join(["```", *commands, "```"])


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def run_link(platform: Platform, text: str, experiment_id: str, run_id: str, tab: str = "") -> str:
    """Return a Markdown link to the page of a run. In a Databricks workspace, return the text without a link.

    A workspace has its own addresses for MLflow's pages, and shows its own links to them.
    """
    return _link(platform, text, f"experiments/{experiment_id}/runs/{run_id}{tab}")


def version_link(platform: Platform, name: str, version: str) -> str:
    """Return a Markdown link to the page of a model version. In a Databricks workspace, return only the text."""
    return _link(platform, f"{name} version {version}", f"models/{quote(name, safe='')}/versions/{version}")


def picture(platform: Platform, run_id: str, artifact: str) -> str:
    """Return Markdown that shows a picture from the artifacts of a run.

    In a Databricks workspace, return an empty text, because the workspace does not show pictures of artifacts.
    """
    if platform.kind != "local":
        return ""
    return f"![{artifact}](get-artifact?{urlencode({'path': artifact, 'run_uuid': run_id})})"


def _link(platform: Platform, text: str, address: str) -> str:
    return f"[{text}](#/{address}?{VIEW})" if platform.kind == "local" else text
