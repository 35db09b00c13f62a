"""RunConfig: four names (model, data, train, platform) resolved into one frozen object, or one error with all problems.

Science lives in YAML under conf/, one file a choice; `--set a.b=c` overrides one value. A file in ./conf of the
working directory comes before the one that ships with the package.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, PositiveInt, ValidationError

from pipelines.config.data import DataConfig
from pipelines.config.gate import DriftConfig, GateConfig
from pipelines.config.train import TrainConfig
from pipelines.errors import ConfigError
from vlm.config import Config, ModelConfig

OWN = ("gate", "drift")
"""Sections that a run holds itself."""
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]


# ------------------------------------------------------------------------------------------------ platform


class SparkConfig(Config):
    """The local session: master, memory, and partitions of a shuffle."""

    master: Annotated[str, Field(pattern=r"^(local\[[0-9*]+\]|local-cluster\[\d+,\d+,\d+\]|spark://.+)$")] = "local[*]"
    driver_memory: str = "4g"
    shuffle_partitions: PositiveInt = 2


CacheGib = Annotated[float, Field(ge=0)]
"""Disk of each machine that copies of shards may take, where their folder is on a network; 0: nothing is copied."""


class LocalPlatformConfig(Config):
    """A laptop: embedded Spark, Delta under .lakesight/, SQLite MLflow, CPU ranks."""

    kind: Literal["local"] = "local"
    spark: SparkConfig = SparkConfig()
    ranks: PositiveInt = 2
    cache_gib: CacheGib = 0.0


class DatabricksPlatformConfig(Config):
    """A workspace. The deployment (databricks.yml) owns these values and passes them with --set."""

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
    """The names a run was made of, as file stems under conf/."""

    model: Name
    data: Name
    train: Name
    platform: Name


class RunConfig(Config):
    """Everything a run needs to know, resolved. Each layer receives only its own slice."""

    name: Name
    chosen: Chosen
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    platform: PlatformConfig
    gate: GateConfig = GateConfig()
    drift: DriftConfig = DriftConfig()

    def to_json(self) -> str:
        """The resolved config as JSON; `from_json` gives back an equal object."""
        return self.model_dump_json(indent=2, by_alias=True)

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """Inverse of `to_json`.

        Raises:
            ConfigError: the text is not a RunConfig.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise _as_config_error(error, cls, "a saved run") from None


def short_hash(*parts: object) -> str:
    """The first 16 hex digits of a SHA-256 over the parts as canonical JSON."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def conf_folders() -> list[Path]:
    """Folders that hold YAML, first match wins: ./conf, then the one that came with the package."""
    shipped = Path(__file__).parents[1] / "conf"
    return [Path("conf"), shipped if shipped.is_dir() else Path(__file__).parents[2] / "conf"]


def available(kind: str) -> list[str]:
    """Names that `conf/<kind>/` offers, sorted."""
    return sorted({path.stem for folder in conf_folders() for path in (folder / kind).glob("*.yml")})


def load_run(name: str, *, platform: str = "local", overrides: Sequence[str] = ()) -> RunConfig:
    """Resolve a run's four names and apply `a.b=c` overrides.

    A run may hold its data section itself, where it has no other use; then the run's name is the data's name too. What
    it asks of a version that is to serve, its sections `gate` and `drift`, has no other place.

    Raises:
        ConfigError: lists every problem: unknown names and keys with the nearest valid one, values of the wrong type.
    """
    problems: list[str] = []
    run = _read("run", name, problems)
    inline = {"data": run["data"]} if isinstance(run.get("data"), dict) else {}
    chosen = {kind: str(run.get(kind, "")) for kind in ("model", "data", "train")} | {"platform": platform}
    chosen |= dict.fromkeys(inline, name)
    problems += [f"run.{key}: unknown key{_nearest(key, (*chosen, *OWN))}" for key in run if key not in {*chosen, *OWN}]
    problems += [
        f"run.{kind}: missing (one of {', '.join(available(kind))})" for kind in chosen if run and not chosen[kind]
    ]
    elsewhere = [kind for kind in chosen if kind not in inline]
    slices: dict[str, Any] = inline | {k: _read(k, chosen[k], problems) if chosen[k] else {} for k in elsewhere}
    slices |= {section: run.get(section, {}) for section in OWN}
    for override in overrides:
        _apply(slices, override, problems)
    try:
        config = RunConfig.model_validate({"name": name, "chosen": chosen, **slices})
    except ValidationError as error:
        unread = {kind for kind in chosen if not slices[kind]}
        problems += [p for p, top in _describe(error, RunConfig) if top not in unread | {"name", "chosen"}]
        raise _config_error(problems, f"run {name}") from None
    if problems:
        raise _config_error(problems, f"run {name}")
    return config


def load_model(name: str, overrides: Sequence[str] = ()) -> ModelConfig:
    """One model of conf/model/ by name, with `model.a.b=c` overrides.

    Raises:
        ConfigError: no such model, or it does not validate.
    """
    problems: list[str] = []
    slices: dict[str, Any] = {"model": _read("model", name, problems)}
    for override in overrides:
        _apply(slices, override, problems)
    if problems:
        raise _config_error(problems, f"model {name}")
    try:
        return ModelConfig.model_validate(slices["model"])
    except ValidationError as error:
        raise _as_config_error(error, ModelConfig, f"model {name}") from None


def _read(kind: str, name: str, problems: list[str]) -> dict[str, Any]:
    for folder in conf_folders():
        path = folder / kind / f"{name}.yml"
        if Path(name).name == name and path.is_file():
            try:
                raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            except yaml.YAMLError as error:
                problems.append(f"{path}: not YAML ({' '.join(str(error).split())})")
                return {}
            if not isinstance(raw, dict):
                problems.append(f"{path}: got a {type(raw).__name__}, expected a mapping")
                return {}
            return raw
    names = available(kind)
    problems.append(f"{kind}: no {kind} is called {name!r}{_nearest(name, names)} (there are: {', '.join(names)})")
    return {}


def _apply(slices: dict[str, Any], override: str, problems: list[str]) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        problems.append(f"--set {override}: expected a.b=value")
        return
    if keys[0] not in slices:
        problems.append(f"{path}: unknown key {keys[0]!r}{_nearest(keys[0], slices)}")
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


def _config_error(problems: Iterable[str], where: str) -> ConfigError:
    listed = list(dict.fromkeys(problems))
    noun = "problem" if len(listed) == 1 else "problems"
    return ConfigError(
        f"the configuration has {len(listed)} {noun}",
        where=where,
        got="; ".join(listed),
        fix="correct the YAML or the --set option named; `lakesight config` prints what a run resolves to",
    )


def _as_config_error(error: ValidationError, root: type[BaseModel], where: str) -> ConfigError:
    return _config_error((text for text, _ in _describe(error, root)), where)


def _describe(error: ValidationError, root: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Each pydantic problem as (sentence with path and nearest name, first path element)."""
    for item in error.errors():
        path, siblings = _field_path(root, item["loc"])
        last = str(item["loc"][-1]) if item["loc"] else ""
        if item["type"] == "extra_forbidden":
            text = f"unknown key{_nearest(last, siblings)}"
        elif item["type"] == "missing":
            text = "missing"
        elif item["type"] == "union_tag_not_found":
            text = "kind is missing"
        elif item["type"] == "union_tag_invalid":
            context = item["ctx"]
            tags = [tag.strip(" '") for tag in str(context["expected_tags"]).split(",")]
            text = f"unknown kind {context['tag']!r}{_nearest(str(context['tag']), tags)} (one of {', '.join(tags)})"
        else:
            text = item["msg"].removeprefix("Value error, ")
            if not isinstance(item["input"], dict):
                text += f" (got {item['input']!r})"
        yield f"{path}: {text}" if path else text, path.partition(".")[0]


def _field_path(root: type[BaseModel], loc: Sequence[int | str]) -> tuple[str, list[str]]:
    """The dotted path as the user wrote it (without union tags) and the names valid at its last step."""
    candidates: list[type[BaseModel]] = [root]
    parts: list[str] = []
    siblings: list[str] = []
    for step in loc:
        tagged = [m for m in candidates if _tag(m) == step] if len(candidates) > 1 else []
        if tagged:
            candidates = tagged
            continue
        siblings = sorted({f.alias or n for model in candidates for n, f in model.model_fields.items()})
        parts.append(str(step))
        annotations = [
            f.annotation for model in candidates for n, f in model.model_fields.items() if step in (n, f.alias)
        ]
        candidates = [m for annotation in annotations for m in _models(annotation)]
    return ".".join(parts), siblings


def _tag(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    return get_args(kind.annotation)[0] if kind else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return [model for arg in get_args(annotation) for model in _models(arg)]
    return []


def _nearest(name: str, valid: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f", did you mean {match[0]!r}?" if match else ""
