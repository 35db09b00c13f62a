"""The config of a run: four names (model, data, train, platform) are resolved into one frozen RunConfig.

Invalid settings raise one error that lists every problem. Settings are stored in YAML files under conf/, one file per
name. `--set a.b=c` overrides one value. A file in ./conf of the working folder takes precedence over the file of the
same name in the package.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PositiveInt, ValidationError

from pipelines.config.data import DataConfig
from pipelines.config.gate import DriftConfig, GateConfig
from pipelines.config.problems import config_error, describe, validation_error
from pipelines.config.train import TrainConfig
from vlm.config import Config, ModelConfig
from vlm.errors import did_you_mean

RUN_SECTIONS = ("gate", "drift")
"""Sections of the config that are written in the YAML file of the run."""
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]


# ------------------------------------------------------------------------------------------------ platform


class SparkConfig(Config):
    """Settings of the local Spark session: master, driver memory, and number of shuffle partitions."""

    master: Annotated[str, Field(pattern=r"^(local\[[0-9*]+\]|local-cluster\[\d+,\d+,\d+\]|spark://.+)$")] = "local[*]"
    driver_memory: str = "4g"
    shuffle_partitions: PositiveInt = 2


CacheGib = Annotated[float, Field(ge=0)]
"""Disk space on each host for local copies of remote shards, in GiB. With 0 GiB, shards are not copied."""


class LocalPlatformConfig(Config):
    """Settings of a laptop with embedded Spark, Delta tables under .lakesight/, MLflow on SQLite, and CPU ranks."""

    kind: Literal["local"] = "local"
    spark: SparkConfig = SparkConfig()
    ranks: PositiveInt = 2
    cache_gib: CacheGib = 0.0


class DatabricksPlatformConfig(Config):
    """Settings of a Databricks workspace. The file databricks.yml holds these values and passes them with --set."""

    kind: Literal["databricks"]
    catalog: Identifier
    schema_: Annotated[Identifier, Field(alias="schema")]
    volume: Identifier
    ranks: PositiveInt
    use_gpu: bool = True
    cache_gib: CacheGib = 100.0


PlatformConfig = Annotated[LocalPlatformConfig | DatabricksPlatformConfig, Field(discriminator="kind")]


# ------------------------------------------------------------------------------------------------ the run


class Chosen(Config):
    """The four names of a run. A name is the name of a YAML file under conf/ without `.yml`."""

    model: Name
    data: Name
    train: Name
    platform: Name


class RunConfig(Config):
    """All settings of a run after names and overrides are resolved."""

    name: Name
    chosen: Chosen
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    platform: PlatformConfig
    gate: GateConfig = GateConfig()
    drift: DriftConfig = DriftConfig()

    def to_json(self) -> str:
        """Return the resolved config as JSON. `from_json` restores an equal object."""
        return self.model_dump_json(indent=2, by_alias=True)

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """Restore a config from the JSON of `to_json`.

        Raises:
            ConfigError: the text is not a RunConfig.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise validation_error(error, cls, "a saved run") from None


def short_hash(*parts: object) -> str:
    """Return the first 16 hex digits of the SHA-256 of the parts as canonical JSON."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def conf_folders() -> list[Path]:
    """Return the folders that are searched for YAML files, in order: ./conf, then the conf folder of the package."""
    shipped = Path(__file__).parents[1] / "conf"
    return [Path("conf"), shipped if shipped.is_dir() else Path(__file__).parents[2] / "conf"]


def available(kind: str) -> list[str]:
    """Return the names of the YAML files in `conf/<kind>/` without `.yml`, sorted."""
    return sorted({path.stem for folder in conf_folders() for path in (folder / kind).glob("*.yml") if path.is_file()})


def load_run(name: str, *, platform: str = "local", overrides: Sequence[str] = ()) -> RunConfig:
    """Resolve a run's four names into a RunConfig and apply `a.b=c` overrides.

    The YAML file of a run may contain the data section itself. The data section then has the name of the run. The file
    may also contain the sections `gate` and `drift`.

    Raises:
        ConfigError: a name or key is unknown, or a value is invalid. The error lists every problem.
    """
    problems: list[str] = []
    run = _read("run", name, problems)
    inline = {"data": run["data"]} if isinstance(run.get("data"), dict) else {}
    chosen = {kind: str(run.get(kind, "")) for kind in ("model", "data", "train")} | {"platform": platform}
    chosen |= dict.fromkeys(inline, name)
    sections = (*chosen, *RUN_SECTIONS)
    problems += [f"run.{key}: unknown key{did_you_mean(key, sections)}" for key in run if key not in sections]
    problems += [
        f"run.{kind}: missing (one of {', '.join(available(kind))})" for kind in chosen if run and not chosen[kind]
    ]
    elsewhere = [kind for kind in chosen if kind not in inline]
    slices: dict[str, Any] = inline | {k: _read(k, chosen[k], problems) if chosen[k] else {} for k in elsewhere}
    slices |= {section: run.get(section, {}) for section in RUN_SECTIONS}
    for override in overrides:
        _apply(slices, override, problems)
    try:
        config = RunConfig.model_validate({"name": name, "chosen": chosen, **slices})
    except ValidationError as error:
        unread = {kind for kind in chosen if not slices[kind]}
        problems += [p for p, top in describe(error, RunConfig) if top not in unread | {"name", "chosen"}]
        raise config_error(problems, f"run {name}") from None
    if problems:
        raise config_error(problems, f"run {name}")
    return config


def load_model(name: str, overrides: Sequence[str] = ()) -> ModelConfig:
    """Load a model config from conf/model/ by name and apply `model.a.b=c` overrides.

    Raises:
        ConfigError: no model has this name, or its settings are invalid.
    """
    problems: list[str] = []
    slices: dict[str, Any] = {"model": _read("model", name, problems)}
    for override in overrides:
        _apply(slices, override, problems)
    if problems:
        raise config_error(problems, f"model {name}")
    try:
        return ModelConfig.model_validate(slices["model"])
    except ValidationError as error:
        raise validation_error(error, ModelConfig, f"model {name}") from None


def _read(kind: str, name: str, problems: list[str]) -> dict[str, Any]:
    for folder in conf_folders():
        path = folder / kind / f"{name}.yml"
        if re.fullmatch(NAME_PATTERN, name) and path.is_file():
            try:
                raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                problems.append(f"{path}: invalid YAML ({' '.join(str(error).split())})")
                return {}
            if not isinstance(raw, dict):
                problems.append(f"{path}: got a {type(raw).__name__}, expected a mapping")
                return {}
            if wrong := [key for key in raw if not isinstance(key, str)]:
                problems.append(f"{path}: key {wrong[0]!r} is not a string, write it in quotes")
                return {}
            return raw
    names = available(kind)
    problems.append(f"{kind}: no {kind} is called {name!r}{did_you_mean(name, names)} (available: {', '.join(names)})")
    return {}


def _apply(slices: dict[str, Any], override: str, problems: list[str]) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        problems.append(f"--set {override}: expected a.b=value")
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
        node[keys[-1]] = yaml.safe_load(text) if structured else text
    except yaml.YAMLError:
        problems.append(f"{path}: {text!r} is not a YAML list or mapping")
