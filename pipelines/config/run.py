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
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveInt, ValidationError, model_validator

from pipelines.config.data import DataConfig
from pipelines.config.gate import DriftConfig, GateConfig
from pipelines.config.overrides import apply_override
from pipelines.config.problems import config_error, validation_error
from pipelines.config.train import TrainConfig
from vlm.config import ADDED_LATER, Config, ModelConfig
from vlm.config.problems import describe
from vlm.config.yaml_file import YamlProblem, read_mapping
from vlm.errors import did_you_mean

RUN_SECTIONS = ("gate", "drift")
"""Sections of the config that have no YAML files of their own, because the YAML file of the run contains them."""
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]


# ------------------------------------------------------------------------------------------------ platform


OWN_SPARK_SETTINGS = {
    "spark.master": "use platform.spark.master",
    "spark.driver.memory": "use platform.spark.driver_memory",
    "spark.sql.shuffle.partitions": "use platform.spark.shuffle_partitions",
    "spark.jars": "use spark.driver.extraClassPath and spark.executor.extraClassPath",
    "spark.sql.extensions": "Lakesight sets this to Delta's extension",
    "spark.sql.catalog.spark_catalog": "Lakesight sets this to Delta's catalog",
    "spark.sql.warehouse.dir": "Lakesight keeps tables in the home folder",
    "spark.sql.session.timeZone": "Lakesight stores times in UTC",
    "spark.authenticate": "on a laptop, Lakesight protects Spark's ports with a secret",
    "spark.lakesight": "these settings belong to Lakesight",
}
"""Spark settings that users cannot set. The dict maps the name of a setting, or the beginning of the name, to the
reason or to an alternative."""
LOOPBACK_SETTINGS = ("spark.driver.host", "spark.driver.bindAddress")
"""Spark settings that users can set only if the master is a cluster."""
DRIVER_MEMORY = "4g"


def _flatten(value: Any, prefix: str = "") -> Any:
    """Flatten the mapping of `--set platform.spark.conf.spark.a.b=1`, and convert integers and booleans to text."""
    if not isinstance(value, dict):
        return value
    flat: dict[Any, Any] = {}
    for key, each in value.items():
        name = f"{prefix}{key}"
        if isinstance(each, dict):
            flat |= _flatten(each, f"{name}.")
        else:
            flat[name] = str(each).lower() if isinstance(each, bool) else str(each) if isinstance(each, int) else each
    return flat


class SparkConfig(Config):
    """Settings of the Spark session.

    Attributes:
        master: Spark's master URL in one of the forms local[CORES], local-cluster[EXECUTORS,CORES,MIB],
            spark://HOST:PORT, yarn, k8s://HOST:PORT, or sc://HOST:PORT for a Spark Connect server.
        driver_memory: size of the Spark driver's Java heap; a Spark Connect server has its own driver.
        shuffle_partitions: number of partitions into which Spark shuffles rows.
        conf: further Spark settings, as a mapping from name to value, such as {spark.executor.memory: 8g}. Lakesight
            neither stores nor prints nor hashes `conf`, because a value may be a secret, such as the key of an object
            store.
    """

    master: Annotated[
        str, Field(pattern=r"^(local\[[0-9*]+\]|local-cluster\[\d+,\d+,\d+\]|(spark|k8s|sc)://.+|yarn)$")
    ] = "local[*]"
    driver_memory: str = DRIVER_MEMORY
    shuffle_partitions: PositiveInt = 2
    conf: Annotated[dict[str, str], BeforeValidator(_flatten), Field(exclude=True, repr=False)] = Field(
        default_factory=dict
    )

    @property
    def is_on_this_machine(self) -> bool:
        """Whether the driver and all executors run on this machine."""
        return self.master.startswith("local")

    @property
    def is_connect(self) -> bool:
        """Whether the session is a Spark Connect session on a running server."""
        return self.master.startswith("sc://")

    @model_validator(mode="after")
    def _fits_a_connect_server(self) -> Self:
        if self.is_connect and "token=" in self.master:
            raise ValueError(
                "master: an address with a token would be stored with the run: remove the token, and set the variable "
                "SPARK_CONNECT_AUTHENTICATE_TOKEN"
            )
        if self.is_connect and self.driver_memory != DRIVER_MEMORY:
            raise ValueError("driver_memory: a Spark Connect server has its own driver: set the memory of the server")
        return self

    @model_validator(mode="after")
    def _sets_nothing_twice(self) -> Self:
        own = dict(OWN_SPARK_SETTINGS)
        if self.is_on_this_machine:
            own |= dict.fromkeys(
                LOOPBACK_SETTINGS, "on a laptop, Spark's ports listen on the loopback device (127.0.0.1) only"
            )
        for name in self.conf:
            if not name.startswith("spark."):
                raise ValueError(f"conf: {name!r} is not a Spark setting: names of Spark settings begin with 'spark.'")
            for taken, reason in own.items():
                if name == taken or name.startswith(f"{taken}."):
                    raise ValueError(f"conf: {name} cannot be set: {reason}")
        return self


CacheGib = Annotated[float, Field(ge=0)]
"""Disk space on each host for local copies of remote shards, in GiB. With 0 GiB, shards are not copied."""


class LocalPlatformConfig(Config):
    """Settings of a laptop. Spark is embedded, and the home folder contains the Delta tables and MLflow's SQLite file.

    Attributes:
        spark: settings of the Spark session.
        ranks: number of training processes. The ranks use GPUs if `spark.master` is local[CORES] and the machine has a
            GPU for each rank. Otherwise, the ranks use CPUs.
        cache_gib: disk space for local copies of remote shards, in GiB; 0 for no copies.
    """

    kind: Literal["local"] = "local"
    spark: SparkConfig = SparkConfig()
    ranks: PositiveInt = 2
    cache_gib: CacheGib = 0.0


class DatabricksPlatformConfig(Config):
    """Settings of a Databricks workspace. The bundle (databricks.yml) sets the required settings with --set.

    Attributes:
        catalog: name of the catalog in Unity Catalog.
        schema_: name of the schema that holds the tables and the registered models.
        volume: name of the Volume that holds all files, such as shards and checkpoints.
        ranks: number of training processes.
        use_gpu: whether each rank gets a GPU; if false, ranks use CPUs.
        cache_gib: disk space on each host for local copies of remote shards, in GiB; 0 for no copies.
        experiment: full name of one MLflow experiment for everything, or null for separate experiments under
            `/Shared/lakesight/`: one for each run config, one for all ingests, and one for all caption jobs.
    """

    kind: Literal["databricks"]
    catalog: Identifier
    schema_: Annotated[Identifier, Field(alias="schema")]
    volume: Identifier
    ranks: PositiveInt
    use_gpu: bool = True
    cache_gib: CacheGib = 100.0
    experiment: Annotated[str | None, Field(pattern=r"^/.*[^/]$"), ADDED_LATER] = None


PlatformConfig = Annotated[LocalPlatformConfig | DatabricksPlatformConfig, Field(discriminator="kind")]


# ------------------------------------------------------------------------------------------------ the run


class Chosen(Config):
    """The four names that select a run's settings. Each name is the name of a YAML file under conf/, without `.yml`.

    If the YAML file of the run contains the section `data` itself, `data` is the name of the run.
    """

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

    @model_validator(mode="after")
    def _can_name_a_model(self) -> Self:
        if self.platform.kind == "databricks" and "." in self.name:
            raise ValueError(
                f"the run is named {self.name!r}, but Unity Catalog allows no dot in a model name: rename the run"
            )
        return self

    @model_validator(mode="after")
    def _text_for_a_model_of_text(self) -> Self:
        if (self.data.source.kind == "text") != self.model.text_only:
            raise ValueError(
                "model.text_only must be true for a source of kind text, and false for all other sources: got "
                f"model.text_only {self.model.text_only} and data.source.kind {self.data.source.kind}"
            )
        train = self.train
        of_pictures = train.augment or train.score_every or train.adapter or train.contrastive or train.rewards_cider
        if self.model.text_only and of_pictures:
            raise ValueError(
                "a text-only model reads no pictures: remove augment, score_every, adapter, contrastive and the "
                "objective cider from train"
            )
        return self

    def to_json(self) -> str:
        """Return the resolved config as JSON, without `platform.spark.conf`. `from_json` restores the RunConfig."""
        return self.model_dump_json(indent=2, by_alias=True)

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """Restore a config from the JSON of `to_json`.

        Raises:
            ConfigError: the JSON does not describe a valid RunConfig.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise validation_error(error, cls, "a saved run") from None


def short_hash(*parts: object) -> str:
    """Write the parts as canonical JSON, and return the first 16 hex digits of the SHA-256."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def conf_folders() -> list[Path]:
    """Return the folders that are searched for YAML files, in order: ./conf, then the conf folder of the package."""
    shipped = Path(__file__).parents[1] / "conf"
    return [Path("conf"), shipped if shipped.is_dir() else Path(__file__).parents[2] / "conf"]


def available(kind: str) -> list[str]:
    """Return the names of the YAML files in `conf/<kind>/` without `.yml`, sorted."""
    files = [path for folder in conf_folders() for path in (folder / kind).glob("*.yml")]
    return sorted({path.stem for path in files if re.fullmatch(NAME_PATTERN, path.stem) and path.is_file()})


def load_run(name: str, *, platform: str = "local", overrides: Sequence[str] = ()) -> RunConfig:
    """Resolve a run's four names into a RunConfig and apply `a.b=c` overrides.

    The YAML file of a run may contain the section `data` itself instead of the name of a data config. A data config in
    the YAML file of a run has the same name as the run. The YAML file may also contain the sections `gate` and `drift`.

    Raises:
        ConfigError: a name or key is unknown, or a value is invalid. The error lists every problem.
    """
    problems: list[str] = []
    files = {"run": _find("run", name, problems)}
    run = _read(files["run"], problems) or {}
    if files["run"] and not run and not problems:
        problems.append(f"{files['run']}: the file is empty: write the keys model, train and data")
    inline = {"data": run["data"]} if isinstance(run.get("data"), dict) else {}
    chosen = {kind: _chosen_name(run, kind, problems) for kind in ("model", "data", "train")} | {"platform": platform}
    chosen |= dict.fromkeys(inline, name)
    sections = (*chosen, *RUN_SECTIONS)
    problems += [f"run.{key}: unknown key{did_you_mean(key, sections)}" for key in run if key not in sections]
    problems += [
        f"run.{kind}: missing (one of {', '.join(available(kind))})" for kind in chosen if run and not chosen[kind]
    ]
    files |= {
        kind: _find(kind, chosen[kind], problems) if chosen[kind] else None for kind in chosen if kind not in inline
    }
    slices: dict[str, Any] = inline | {kind: _read(files[kind], problems) for kind in chosen if kind not in inline}
    unread = {kind for kind in chosen if slices[kind] is None}
    slices |= {kind: {} for kind in unread}
    slices |= {section: run.get(section, {}) for section in RUN_SECTIONS}
    given: dict[str, Any] = {kind: {} for kind in slices}
    for override in overrides:
        apply_override(slices, override, problems)
        apply_override(given, override, [])
    try:
        config = RunConfig.model_validate({"name": name, "chosen": chosen, **slices})
    except ValidationError as error:
        files |= dict.fromkeys((*inline, *RUN_SECTIONS), files["run"])
        files |= dict.fromkeys((override.partition(".")[0] for override in overrides), None)
        found = [(p, top) for p, top in describe(error, RunConfig) if top not in unread | {"name", "chosen"}]
        problems += [f"{files[top]}: {problem}" if files.get(top) else problem for problem, top in found]
        raise config_error(problems, f"run {name}") from None
    if problems := problems + config.train.find_unused(given["train"]):
        raise config_error(problems, f"run {name}")
    return config


def load_model(name: str, overrides: Sequence[str] = ()) -> ModelConfig:
    """Load a model config from conf/model/ by name and apply `model.a.b=c` overrides.

    Raises:
        ConfigError: no model has this name, or its settings are invalid.
    """
    problems: list[str] = []
    file = _find("model", name, problems)
    slices: dict[str, Any] = {"model": _read(file, problems) or {}}
    for override in overrides:
        apply_override(slices, override, problems)
    if problems:
        raise config_error(problems, f"model {name}")
    try:
        return ModelConfig.model_validate(slices["model"])
    except ValidationError as error:
        raise validation_error(error, ModelConfig, f"model {name} ({file})") from None


def _chosen_name(run: dict[str, Any], kind: str, problems: list[str]) -> str:
    """Return the name under the key `kind` (such as `data`) in a run's YAML file, or an empty string without this key.

    If the value is no name, add a message to `problems` and return an empty string.
    """
    name = run.get(kind)
    if isinstance(name, bool | float | list | date):
        problems.append(f"run.{kind}: got {name!r}, which YAML does not read as a name: write the name in quotes")
        return ""
    return "" if name is None else str(name)


def _find(kind: str, name: str, problems: list[str]) -> Path | None:
    """Return the path of the YAML file that belongs to a name. If no such file exists, add a message to `problems`."""
    if re.fullmatch(NAME_PATTERN, name):
        for folder in conf_folders():
            path = folder / kind / f"{name}.yml"
            if path.is_file():
                return path
            if path.with_name(f"{name}.yaml").is_file():
                problems.append(
                    f"{path.with_name(f'{name}.yaml')}: the file is not read because of its suffix: rename the file to "
                    f"{path.name}"
                )
                return None
        rule, new = "", f"; or write conf/{kind}/{name}.yml"
    else:
        new = ""
        rule = ", because a name has at most 64 letters, digits, dots, _ and -, and begins with a letter or digit"
    names = available(kind)
    similar = did_you_mean(name, names)
    problems.append(f"{kind}: no {kind} is called {name!r}{rule}{similar} (available: {', '.join(names)}{new})")
    return None


def _read(path: Path | None, problems: list[str]) -> dict[str, Any] | None:
    """Read a YAML file, or return None if `path` is None. If the file cannot be used, return None and add a message to
    `problems`.
    """
    if path is None:
        return None
    try:
        return read_mapping(path)
    except YamlProblem as problem:
        problems.append(f"{path}: {problem}")
        return None
