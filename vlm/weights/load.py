"""From another library's folders to a model: the configs are compared, then names, shapes and types, then tensors move.

Nothing is read before everything fits. The model is built without memory for its weights; each tensor is copied from
its file to its place, the largest first, so the peak is the model and little more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vlm.build import build_model, initialize_weights
from vlm.config import Config, ModelConfig
from vlm.errors import CheckpointError
from vlm.model import VisionLanguageModel
from vlm.weights.family import Family, Part, families
from vlm.weights.files import WeightFiles, read_settings
from vlm.weights.plan import Plan, make_plan, together
from vlm.weights.rules import Rule, resample

ADDED = ("decoder.cross_blocks.",)
"""Parameters inside a part that only a composed model has."""


class PartReport(Config):
    """What became of one folder's tensors.

    Attributes:
        part: of the model.
        family: of the weights.
        folder: they came from.
        used: tensors that filled parameters.
        tied: tensors that repeat another.
        dropped: why, and the tensors left behind.
        resampled: positions interpolated for another resolution: from which grid to which.
        unchecked: what of the model's config the folder's does not say.
    """

    part: Part
    family: str
    folder: str
    used: int
    tied: tuple[str, ...]
    dropped: dict[str, tuple[str, ...]]
    resampled: tuple[str, ...]
    unchecked: tuple[str, ...]


class ImportReport(Config):
    """What became of everything.

    Attributes:
        parameters: of the model.
        parts: a folder each.
        fresh: parameters no folder had, drawn anew.
    """

    parameters: int
    parts: tuple[PartReport, ...]
    fresh: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """One folder met with the part of the model it fills."""

    part: Part
    family: Family
    files: WeightFiles
    names: Mapping[str, str]
    plan: Plan
    settings: Mapping[str, Any]


def import_weights(
    config: ModelConfig, vocab_size: int, folders: Mapping[Part, Path], *, seed: int = 0
) -> tuple[VisionLanguageModel, ImportReport]:
    """A model in evaluation mode whose parts come from published folders; what no folder has is drawn from `seed`.

    Args:
        config: of the model.
        vocab_size: rows of its token table.
        folders: by the part they fill: `model`, or `encoder` and `decoder` or one of them.
        seed: of fresh parameters.

    Raises:
        CheckpointError: a folder cannot be read, is of another family, or does not fit; one error lists all of it.
    """
    model = _without_memory(config, vocab_size)
    sources = [_meet(part, folder, config, model) for part, folder in folders.items()]
    problems = [
        f"[{source.part}] {problem}" if len(sources) > 1 else problem
        for source in sources
        for problem in source.plan.problems
    ]
    if problems:
        raise CheckpointError(
            "the weights do not fit the model, and none was read",
            where=", ".join(str(source.files.folder) for source in sources),
            got="; ".join(problems),
            fix="choose the model config of these weights, or the weights of this config",
        )
    fresh = _make_fresh(model, {name for source in sources for rule in source.plan.rules for name in rule.ours}, seed)
    for source in sources:
        _check_ties(source)
    steps = [(source, rule) for source in sources for rule in source.plan.rules]
    for source, rule in sorted(steps, key=lambda step: _size(*step), reverse=True):
        _fill(model, rule.ours, _read(source, rule, model))
    report = ImportReport(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        parts=tuple(_report(source) for source in sources),
        fresh=together(fresh),
    )
    return model.eval(), report


# ------------------------------------------------------------------------------------------------ before reading


def _meet(part: Part, folder: Path, config: ModelConfig, model: nn.Module) -> Source:
    settings = read_settings(folder)
    family = recognise(settings, folder, part)
    _compare(family, config, settings, folder)
    files = WeightFiles(folder)
    names = family.canonical(files.headers)
    ours = {name: parameter for name, parameter in model.named_parameters() if belongs(name, part)}
    plan = make_plan(family.table(config), ours, {name: files.headers[names[name]] for name in names})
    return Source(part, family, files, names, plan, settings)


def belongs(name: str, part: Part) -> bool:
    """Whether a parameter is of a part, as published: what a composed model adds is not."""
    return part == "model" or (name.startswith(f"{part}.") and not name.startswith(ADDED))


def recognise(settings: Mapping[str, Any], folder: Path, part: Part) -> Family:
    """The family of a folder, by its config.json.

    Raises:
        CheckpointError: it is of none that is known, or of one that fills another part.
    """
    known = [family for family in families() if family.settings(settings) is not None]
    fitting = [family for family in known if family.part == part]
    if fitting:
        return fitting[0]
    kind = settings.get("model_type", settings.get("architecture", "nothing"))
    raise CheckpointError(
        f"the folder holds no {part} of a known family",
        where=str(folder),
        got=f"its config.json says {kind}" + "".join(f", whose part is the {family.part}" for family in known[:1]),
        fix=f"families with a {part}: " + ", ".join(family.name for family in families() if family.part == part),
    )


def _compare(family: Family, config: ModelConfig, settings: Mapping[str, Any], folder: Path) -> None:
    differ = family.disagreements(config, settings)
    if not differ:
        return
    wanted = [other.name for other in families() if other.part == family.part and other.fits(config)]
    make = "is of another size" if family.name in wanted else f"is made like {' or '.join(wanted) or 'none known'}"
    raise CheckpointError(
        f"the weights are of family {family.name}, and the {family.part} of the model {make}",
        where=str(folder),
        got="; ".join(differ),
        fix="choose the model config of these weights, or change these values with --set",
    )


def _check_ties(source: Source) -> None:
    """A tensor that only repeats another must do so: else a head of its own would be lost."""
    for name, partner in source.plan.tied.items():
        if not torch.equal(*(source.files.read(source.names[key]) for key in (name, partner))):
            raise CheckpointError(
                "the weights have an output head of their own, which the model ties to its token table",
                where=str(source.files.folder),
                got=f"{name} differs from {partner}",
                fix="set decoder.tie_embeddings: false in the model config",
            )


# ------------------------------------------------------------------------------------------------ without memory


RANDOM = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_)


class _WithoutMemory(TorchFunctionMode):
    """`torch.empty`, which layers make their weights with, takes no memory; tables computed at construction do.

    Random values for what has no memory are left out: asking torch for them loads its compiler, 150 MB and seconds.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        if func in RANDOM:
            tensor: Tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@contextmanager
def _own_generator(seed: int) -> Iterator[None]:
    """Randomness from `seed`, which leaves the caller's generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _without_memory(config: ModelConfig, vocab_size: int) -> VisionLanguageModel:
    with _own_generator(0), _WithoutMemory():
        return build_model(config, vocab_size)


def _make_fresh(model: VisionLanguageModel, filled: set[str], seed: int) -> list[str]:
    """Give the parameters that no file fills their memory and the values of a new model; returns their names."""
    fresh = {name: parameter for name, parameter in model.named_parameters() if name not in filled}
    absent = {name: torch.empty(parameter.shape) for name, parameter in fresh.items() if parameter.is_meta}
    _fill(model, list(absent), list(absent.values()))
    with _own_generator(seed):
        for module in sorted({name.rpartition(".")[0] for name in absent}):
            model.get_submodule(module).reset_parameters()  # type: ignore[operator]  # what torch.empty filled has it
        with _WithoutMemory():
            initialize_weights(model)
    return list(fresh)


# ------------------------------------------------------------------------------------------------ tensors move


def _size(source: Source, rule: Rule) -> int:
    return sum(torch.Size(source.files.headers[source.names[name]].shape).numel() for name in rule.theirs)


def _read(source: Source, rule: Rule, model: nn.Module) -> list[Tensor]:
    tensors = rule.read([source.files.read(source.names[name]) for name in rule.theirs])
    if rule in source.plan.resampled:
        assert rule.grid is not None
        rows = model.get_parameter(rule.ours[0]).shape[1]
        tensors = [resample(tensors[0], rows, rule.grid)]
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]


def _fill(model: nn.Module, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Put tensors in the places of parameters, wherever the same one is used."""
    for name, tensor in zip(names, tensors, strict=True):
        old, new = model.get_parameter(name), nn.Parameter(tensor)
        assert old.shape == new.shape
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is old:
                    module._parameters[key] = new


def _report(source: Source) -> PartReport:
    plan, headers = source.plan, source.files.headers
    return PartReport(
        part=source.part,
        family=source.family.name,
        folder=str(source.files.folder),
        used=sum(len(rule.theirs) for rule in plan.rules),
        tied=tuple(plan.tied),
        dropped={
            reason: together(name for name, why in plan.dropped.items() if why == reason)
            for reason in sorted(set(plan.dropped.values()))
        },
        resampled=tuple(
            f"{rule.ours[0]} from {headers[source.names[rule.theirs[0]]].shape[-2]} rows" for rule in plan.resampled
        ),
        unchecked=tuple(source.family.untold(source.settings)),
    )
