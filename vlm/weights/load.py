"""Import of another library's weights into a model.

An import first compares config.json with the model config, and then the names, shapes and types of the tensors with the
model's parameters. An import reads the data of a tensor only after all these comparisons have succeeded. The model is
built on the meta device, and tensors are copied into the model one by one, the largest first. An import's peak memory
is therefore only slightly above the size of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm.config import Config, ModelConfig
from vlm.errors import CheckpointError
from vlm.factory import build_model, initialize_weights
from vlm.layers.meta import EmptyOnMeta, replace_parameters
from vlm.model import VisionLanguageModel
from vlm.weights.accounting import TrackedSettings, WrongValueError
from vlm.weights.family import Family, Part
from vlm.weights.files import CONFIG, WeightFiles, read_settings
from vlm.weights.generation_keys import account_generation
from vlm.weights.key_rules import CONFIG_RULES, FileReport
from vlm.weights.picture_keys import PREPROCESSOR, read_pictures
from vlm.weights.plan import LoadPlan, merge_block_names, plan_load
from vlm.weights.rules import Rule, resample_positions
from vlm.weights.tables import families

FUSION_PREFIXES = ("decoder.cross_blocks.",)
"""Name prefixes of the decoder parameters that belong to the fusion. Published decoders do not have these parameters.
"""


class PartReport(Config):
    """Report on the tensors of one folder.

    Attributes:
        part: which part of the model the tensors fill (`model`, `encoder` or `decoder`).
        family: name of the weight family, such as `gemma`.
        folder: folder from which the weights were read.
        used: number of tensors that fill parameters.
        tied: names of tensors that are copies of other tensors in the folder.
        dropped: names of the tensors that were left out, as a dict from the reason to the names.
        resampled: names of the position embedding tables that were interpolated to the model's resolution. Each name is
            followed by the number of rows in the file.
        unchecked: paths of the model's config that the folder's config.json does not determine.
        compared: keys of config.json whose values agree with the model.
        without_effect: keys of config.json that have no effect, as a dict from the reason to the keys.
        ignored: weight files of the folder that were not read, because the folder also has model.safetensors.
        files: reports on the keys for pictures and for generation in the other JSON files of the folder.
    """

    part: Part
    family: str
    folder: str
    used: int
    tied: tuple[str, ...]
    dropped: dict[str, tuple[str, ...]]
    resampled: tuple[str, ...]
    unchecked: tuple[str, ...]
    compared: tuple[str, ...]
    without_effect: dict[str, tuple[str, ...]]
    ignored: tuple[str, ...] = ()
    files: tuple[FileReport, ...] = ()


class ImportReport(Config):
    """Result of an import.

    Attributes:
        parameters: number of parameters of the model.
        parts: one report per folder.
        fresh: names of the parameters that no folder contains. These parameters were initialised as in a new model.
    """

    parameters: int
    parts: tuple[PartReport, ...]
    fresh: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """Folder of weights, and the plan according to which the weights fill one part of the model."""

    part: Part
    family: Family
    files: WeightFiles
    names: Mapping[str, str]
    plan: LoadPlan
    settings: Mapping[str, Any]
    reports: tuple[FileReport, ...]
    unchecked: tuple[str, ...]


def import_weights(
    config: ModelConfig, vocab_size: int, folders: Mapping[Part, Path], *, seed: int = 0
) -> tuple[VisionLanguageModel, ImportReport]:
    """Build a model with weights from published folders, and return the model (in evaluation mode) and a report.

    Args:
        config: config of the model.
        vocab_size: number of rows of the token embedding table.
        folders: dict from parts of the model to folders. The keys are `model` alone, or `encoder`, `decoder` or both.
        seed: random seed for initialising the parameters that no folder contains.

    Raises:
        CheckpointError: a folder cannot be read or does not fit the model, or its weights contain NaN or infinity. If
            the config.json of a folder does not fit the model, the error lists all mismatches of this config.json. If
            tensors do not fit the model, the error lists the mismatches of all folders.
    """
    model = _build_on_meta(config, vocab_size)
    sources = [_open_source(part, folder, config, model) for part, folder in folders.items()]
    problems = [
        f"[{source.part}] {problem}" if len(sources) > 1 else problem
        for source in sources
        for problem in source.plan.problems
    ]
    if problems:
        raise CheckpointError(
            "the weights do not fit the model",
            where=", ".join(str(source.files.folder) for source in sources),
            got=problems,
            fix="choose the model config that belongs to these weights, or choose other weights",
        )
    filled = {name for source in sources for rule in source.plan.rules for name in rule.ours}
    fresh = _initialize_fresh(model, filled, seed)
    for source in sources:
        _check_ties(source)
    steps = [(source, rule) for source in sources for rule in source.plan.rules]
    for source, rule in sorted(steps, key=lambda step: _size(*step), reverse=True):
        replace_parameters(model, dict(zip(rule.ours, _read(source, rule, model), strict=True)))
    report = ImportReport(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        parts=tuple(_report(source) for source in sources),
        fresh=merge_block_names(fresh),
    )
    return model.eval(), report


# ------------------------------------------------------------------------------------------------ check


def _open_source(part: Part, folder: Path, config: ModelConfig, model: nn.Module) -> Source:
    settings = read_settings(folder)
    family = find_family(settings, folder, part)
    _check_config(family, config, settings, folder)
    reports, unchecked = ((), ()) if part == "decoder" else _check_pictures(family, config, settings, folder)
    reports += () if part == "encoder" else _check_generation(folder)
    files = WeightFiles(folder)
    names = family.canonical_names(files.headers)
    ours = {name: parameter for name, parameter in model.named_parameters() if in_published_part(name, part)}
    table = family.table(config)
    for tie in table.ties:
        if tie.ours not in ours and tie.theirs in names and tie.partner not in names:
            # the file has only one of two equal tensors, so use this tensor twice
            names[tie.partner] = names[tie.theirs]
    plan = plan_load(table, ours, {name: files.headers[names[name]] for name in names})
    plan.problems[:0] = size_problems(family, settings, files)
    unchecked = (*family.unchecked(settings), *unchecked)
    return Source(part, family, files, names, plan, settings, reports, unchecked)


def in_published_part(name: str, part: Part) -> bool:
    """Return True if a parameter belongs to the given part. Parameters of the fusion belong only to part `model`."""
    return part == "model" or (name.startswith(f"{part}.") and not name.startswith(FUSION_PREFIXES))


def find_family(settings: Mapping[str, Any], folder: Path, part: Part) -> Family:
    """Return the weight family to which the config.json of a folder belongs.

    Raises:
        CheckpointError: the family is unknown, the family's weights are for a different part of the model, or a value
            of config.json has a wrong type or is out of range.
    """
    seen = TrackedSettings(settings, set(), rules=CONFIG_RULES)
    try:
        known = [family for family in families() if family.select_settings(seen) is not None]
    except WrongValueError as error:
        raise _wrong_values(folder, [str(error)]) from None
    fitting = [family for family in known if family.part == part]
    if fitting:
        if problems := fitting[0].wrong_values(settings):
            raise _wrong_values(folder, problems)
        return fitting[0]
    key = next((key for key in ("model_type", "architecture") if key in settings), None)
    named = f"{key} in config.json is {settings[key]!r}" if key else "config.json has no model_type or architecture"
    raise CheckpointError(
        f"the folder has no {part} of a known family",
        where=str(folder),
        got=named + "".join(f", which is a family for the {family.part}" for family in known[:1]),
        fix=f"choose weights of one of the families for the {part}: "
        + ", ".join(family.name for family in families() if family.part == part),
    )


def _wrong_values(folder: Path, problems: list[str]) -> CheckpointError:
    return CheckpointError(
        "the config of the weights has values of a wrong type, or values out of range",
        where=str(folder / CONFIG),
        got=problems,
        fix="download config.json again, or set the values with which the model was trained",
    )


def size_problems(family: Family, settings: Mapping[str, Any], files: WeightFiles) -> list[str]:
    """Return one sentence for each size in config.json that differs from the shapes of the tensors.

    Only the headers of the weight files are read. Each sentence names the key of config.json and both values.
    """
    names = family.canonical_names(files.headers)
    shapes = {name: files.headers[file_name].shape for name, file_name in names.items()}
    return family.contradictions(settings, shapes)


def _check_config(family: Family, config: ModelConfig, settings: Mapping[str, Any], folder: Path) -> None:
    mismatches = family.mismatches(config, settings)
    if not mismatches:
        return
    part = "model" if family.part == "model" else f"{family.part} of the model"
    same_part = [other for other in families() if other.part == family.part]
    fitting = [other.name for other in same_part if other.matches_architecture(config)]
    if family.name in fitting:
        difference = "has other sizes or settings"
    else:
        difference = f"has the architecture of {' or '.join(fitting) or 'no known family'}"
    raise CheckpointError(
        f"the weights are of family {family.name}, but the {part} {difference}",
        where=str(folder),
        got=mismatches,
        fix="choose the model config that belongs to these weights, or change these values with --set; delete a key "
        "from config.json only if the key does not change what the model computes",
    )


def _check_pictures(
    family: Family, config: ModelConfig, settings: Mapping[str, Any], folder: Path
) -> tuple[tuple[FileReport, ...], tuple[str, ...]]:
    """Check that the model preprocesses pictures as the folder describes.

    Returns:
        One report per file, and the settings that could not be compared, because no file describes the preprocessing.
    """
    pictures = read_pictures(folder, family, settings)
    if family.image_processor is None:
        return (), ()  # config.json contains the preprocessing
    if pictures is None or not pictures.values:
        reports = pictures.reports if pictures else ()
        return reports, (f"image, because the folder has no {PREPROCESSOR}",)
    if mismatches := pictures.mismatches(config.image):
        raise CheckpointError(
            "the model preprocesses pictures differently from the published model",
            where=str(folder),
            got=mismatches,
            fix="set these values of the model config, for example with --set model.image.filter=bilinear",
        )
    return pictures.reports, ()


def _check_generation(folder: Path) -> tuple[FileReport, ...]:
    """Check that all keys of generation_config.json are known, and return a report if the file sets a key."""
    report, problems = account_generation(folder)
    if problems:
        raise CheckpointError(
            "a file of the published folder has unknown keys",
            where=str(folder),
            got=problems,
            fix="remove these keys from a copy of the file, if they do not change the answers that you want",
        )
    return () if report is None else (report,)


def _check_ties(source: Source) -> None:
    """Check that tied tensors are equal. If they differ, the output head has its own weights, which an import would
    lose.
    """
    for name, partner in source.plan.tied.items():
        if not torch.equal(*(source.files.read(source.names[key]) for key in (name, partner))):
            raise CheckpointError(
                "the weights have a separate output head, but the model ties the head to its token embeddings",
                where=str(source.files.folder),
                got=f"{name} differs from {partner}",
                fix="set decoder.tie_embeddings: false in the model config",
            )


# ------------------------------------------------------------------------------------------------ meta device


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's random generator at the start of a `with` block, and restore the generator's state at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _build_on_meta(config: ModelConfig, vocab_size: int) -> VisionLanguageModel:
    with _seeded(0), EmptyOnMeta(), torch.device("cpu"):
        return build_model(config, vocab_size)


def _initialize_fresh(model: VisionLanguageModel, filled: set[str], seed: int) -> list[str]:
    """Initialise the parameters that no file fills, as in a new model, and return the names of the parameters."""
    fresh = {name: parameter for name, parameter in model.named_parameters() if name not in filled}
    allocated = {
        name: torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        for name, parameter in fresh.items()
        if parameter.is_meta
    }
    replace_parameters(model, allocated)
    with _seeded(seed):
        for module in sorted({name.rpartition(".")[0] for name in allocated}):
            model.get_submodule(module).reset_parameters()  # type: ignore[operator]  # all such layers have this method
        with EmptyOnMeta():
            initialize_weights(model)
    return list(fresh)


# ------------------------------------------------------------------------------------------------ copy tensors


def _size(source: Source, rule: Rule) -> int:
    return sum(torch.Size(source.files.headers[source.names[name]].shape).numel() for name in rule.theirs)


def _read(source: Source, rule: Rule, model: nn.Module) -> list[Tensor]:
    """Read the tensors of a rule and convert them to our parameters, which are fp32 for any type in the file.

    Raises:
        CheckpointError: a tensor contains NaN or infinity, so the outputs of the model could be NaN.
    """
    read = {name: source.files.read(source.names[name]) for name in rule.theirs}
    for name, tensor in read.items():
        if not _is_finite(tensor):
            raise CheckpointError(
                "the weights contain NaN or infinity",
                where=f"{name} in {source.files.headers[source.names[name]].file}",
                got=f"{int((~torch.isfinite(tensor)).sum()):,} of {tensor.numel():,} values are not finite",
                fix="download the file again; if the values are still not finite, the training of these weights has "
                "diverged: choose other weights",
            )
    tensors = rule.read(list(read.values()))
    if rule in source.plan.resampled:
        assert rule.grid is not None
        rows = model.get_parameter(rule.ours[0]).shape[1]
        tensors = [resample_positions(tensors[0], rows, rule.grid)]
    return [tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format) for tensor in tensors]


def _is_finite(tensor: Tensor) -> bool:
    """Return True if no value is NaN or infinite.

    This function checks only the minimum and the maximum, which are NaN if any value is NaN. `torch.isfinite` would
    allocate another tensor of the same shape. Torch would free that tensor immediately, but the process would keep a
    part of the memory.
    """
    return tensor.numel() == 0 or all(math.isfinite(value) for value in torch.aminmax(tensor))


def _report(source: Source) -> PartReport:
    plan, headers = source.plan, source.files.headers
    account = source.family.account(source.settings)
    return PartReport(
        part=source.part,
        family=source.family.name,
        folder=str(source.files.folder),
        used=sum(len(rule.theirs) for rule in plan.rules),
        tied=tuple(plan.tied),
        dropped={
            reason: merge_block_names(name for name, why in plan.dropped.items() if why == reason)
            for reason in sorted(set(plan.dropped.values()))
        },
        resampled=tuple(
            f"{rule.ours[0]} from {headers[source.names[rule.theirs[0]]].shape[-2]} rows" for rule in plan.resampled
        ),
        unchecked=source.unchecked,
        compared=tuple(account.compared),
        without_effect={reason: tuple(keys) for reason, keys in account.without_effect.items()},
        ignored=source.files.ignored,
        files=source.reports,
    )
