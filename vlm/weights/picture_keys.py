"""Preprocessing of pictures in a published folder: processor_config.json and preprocessor_config.json.

transformers 5 writes the settings to the section `image_processor` of processor_config.json. Older versions of
transformers write the settings to preprocessor_config.json. If a folder has the section and preprocessor_config.json,
transformers and this module read only the section.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.config import ImageConfig, ModelConfig
from vlm.errors import CheckpointError
from vlm.weights.config_fields import sides_of, value_at
from vlm.weights.family import Family
from vlm.weights.files import read_other_settings
from vlm.weights.key_rules import THREE_NUMBERS, FileReport, KeyRule, account_keys, number, only, without_null

PROCESSOR, SECTION, PREPROCESSOR = "processor_config.json", "image_processor", "preprocessor_config.json"
FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Dict from the number of a resize filter in Pillow, which is the value of the key `resample`, to the name of the
filter."""
DEFAULT_SIDE = 224
"""Height and width that transformers assumes for pictures if `image_size` is not set."""

_SQUARE = {"height": DEFAULT_SIDE, "width": DEFAULT_SIDE}
_HALF = [0.5, 0.5, 0.5]
_SHARED: dict[str, Any] = {
    "do_resize": True, "size": _SQUARE, "resample": 3, "default_to_square": True,
    "do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": _HALF, "image_std": _HALF,
}  # fmt: skip
PROCESSORS: dict[str, dict[str, Any]] = {
    "SiglipImageProcessor": {**_SHARED, "default_to_square": False},
    "ViTImageProcessor": {**_SHARED, "resample": 2},
    "Siglip2ImageProcessor": {**_SHARED, "resample": 2},
    "CLIPImageProcessor": {
        **_SHARED,
        "default_to_square": False,
        "size": {"shortest_edge": DEFAULT_SIDE},
        "do_center_crop": True,
        "crop_size": _SQUARE,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
}
"""Dict from a class of transformers that preprocesses pictures to the default values of the class."""

WITHOUT_EFFECT = {
    **dict.fromkeys(
        ("processor_class", "_processor_class", "_valid_processor_keys", "transformers_version"), "describes the file"
    ),
    **dict.fromkeys(
        ("device", "disable_grouping", "return_tensors"), "does not change the numbers that the model computes"
    ),
    "chat_template": "is for chats; a prompt of Lakesight is plain text",
}
"""Keys of the two files that have no effect on an import, and the reason for each key."""
_ANY_SHAPE = dict.fromkeys(
    ("do_resize", "size", "default_to_square", "do_center_crop", "patch_size", "max_num_patches"),
    "is for pictures of any shape, and this import needs square pictures",
)


@dataclass(frozen=True)
class PublishedPictures:
    """Preprocessing of pictures that a published folder describes.

    Attributes:
        file: name of the file that contains the settings. If the settings are in a section, the name of the section
            follows.
        values: dict from keys of our image config to their values.
        sources: dict from keys of our image config to the keys of the file that determine the values.
        reports: one report for each file, or for each section of a file.
    """

    file: str
    values: dict[str, Any]
    sources: dict[str, str]
    reports: tuple[FileReport, ...]

    def mismatches(self, image: ImageConfig) -> list[str]:
        """Return one sentence for each value that differs from the model's image config."""
        return [
            f"image.{key}: {self.sources[key]} in {self.file} gives {value!r}, the model has {getattr(image, key)!r}"
            for key, value in self.values.items()
            if not _equal(getattr(image, key), value)
        ]


def read_pictures(folder: Path, family: Family, settings: Mapping[str, Any]) -> PublishedPictures | None:
    """Read how a published folder preprocesses pictures. Return None if both files are missing or empty, or if
    folders of the family have no file with such settings.

    Args:
        folder: folder with the files.
        family: weight family of the folder.
        settings: content of the folder's config.json.

    Raises:
        CheckpointError: a file cannot be read, has an unknown key, or has a value that Lakesight does not support. The
            error names the file and every refused key.
    """
    if family.image_processor is None:
        return None
    outer = without_null(read_other_settings(folder / PROCESSOR))
    preprocessor = read_other_settings(folder / PREPROCESSOR)
    section = outer.get(SECTION)
    file, found = (PREPROCESSOR, preprocessor) if section is None else (f"{PROCESSOR}, {SECTION}", section)
    if not isinstance(found, dict):
        raise _refused(folder, [f"{SECTION} in {PROCESSOR} is {found!r}, and this import needs an object"])
    side, slots = _published_size(family, settings)
    length = {"image_seq_length": only(slots)} if family.part == "model" else {}
    without_effect = WITHOUT_EFFECT if length else {**WITHOUT_EFFECT, "image_seq_length": "is for whole models"}
    rest = {key: value for key, value in outer.items() if key != SECTION}
    reports, problems = [], []
    if rest:
        report, refused = account_keys(PROCESSOR, rest, length, without_effect, {})
        reports.append(report)
        problems += refused
    if section is not None and preprocessor:
        replaced = dict.fromkeys(("*",), f"is replaced by {SECTION} in {PROCESSOR}, as in transformers")
        reports.append(account_keys(PREPROCESSOR, without_null(preprocessor), {}, replaced, {})[0])
    if not found:
        if problems:
            raise _refused(folder, problems)
        return PublishedPictures(file, {}, {}, tuple(reports)) if reports else None
    if not family.image_processor:
        described = f"{file} describes the preprocessing of pictures, which Lakesight does not know for {family.name}"
        raise _refused(folder, [described])
    kind = _kind(found, family.image_processor)
    if kind not in PROCESSORS:
        needed = ", ".join(PROCESSORS)
        raise _refused(folder, [f"image_processor_type in {file} is {kind!r}, and this import needs one of {needed}"])
    defaults = PROCESSORS[kind]
    found = _without_unset(found, defaults)
    effective = defaults | found
    any_shape = kind == "Siglip2ImageProcessor"
    reasons = {**without_effect, **_unused(effective), **(_ANY_SHAPE if any_shape else {})}
    rules = {**_rules(), **length, "size": _size_rule(effective, side)}
    report, refused = account_keys(file, found, rules, reasons, defaults)
    if problems or refused:
        raise _refused(folder, problems + refused)
    values, sources = _image_values(effective)
    if any_shape:
        values["resize"] = "stretch"
    return PublishedPictures(file, values, sources, (*reports, report))


def _refused(folder: Path, problems: list[str]) -> CheckpointError:
    return CheckpointError(
        "Lakesight cannot preprocess pictures as the published folder describes",
        where=str(folder),
        got=problems,
        fix="choose other weights; or, if the pictures of your model do not need this setting, remove the key from a "
        "copy of the file",
    )


def _published_size(family: Family, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Return the side of the published model's pictures in pixels, and the number of patches of one picture."""
    section = family.select_settings(settings) or {}
    vision = section.get("vision_config") or {} if family.part == "model" else section
    side = sides_of(vision.get("image_size", DEFAULT_SIDE))[0]
    return side, (side // sides_of(vision.get("patch_size", 16))[0]) ** 2


def _kind(found: Mapping[str, Any], default: str) -> str:
    """Return the name of the class that preprocesses pictures, without an ending such as "Fast" for a variant."""
    kind = found.get("image_processor_type") or found.get("feature_extractor_type") or default
    return str(kind).removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")


def _without_unset(found: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings without nulls that mean "not set".

    If a class of transformers has a default for a key, a null in the file replaces this default, and does not mean "not
    set". The null is therefore kept, and the rule of the key refuses the null. The exceptions are `do_center_crop` and
    `default_to_square`, for which a null means False.
    """
    off = {key: False for key in ("do_center_crop", "default_to_square") if key in found and found[key] is None}
    return {key: value for key, value in found.items() if value is not None or key in defaults} | off


def _unused(effective: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys that have no effect because of another value in the same file, and the reasons."""
    reasons = {}
    if effective["do_center_crop"] is False:
        reasons["crop_size"] = "is used only if do_center_crop is true"
    if effective["do_rescale"] is False:
        reasons["rescale_factor"] = "is used only if do_rescale is true"
    if effective["do_normalize"] is False:
        reasons |= dict.fromkeys(("image_mean", "image_std"), "is used only if do_normalize is true")
    if effective.get("do_pad") in (None, False):
        reasons["pad_size"] = "is used only if do_pad is true"
    return reasons


def _rules() -> dict[str, KeyRule]:
    either = only(True, False)
    return {
        "do_resize": only(True),
        "resample": KeyRule("1 (lanczos), 2 (bilinear) or 3 (bicubic)", lambda value: only(*FILTERS).supports(value)),
        "default_to_square": either,
        "do_center_crop": either,
        "crop_size": KeyRule("a square", lambda value: _square(value) is not None),
        "do_pad": only(False),
        "do_rescale": either,
        "rescale_factor": number("a number above 0", lambda value: value > 0),
        "do_normalize": either,
        "image_mean": THREE_NUMBERS,
        "image_std": KeyRule("three numbers other than 0", lambda value: THREE_NUMBERS.supports(value) and all(value)),
        "do_convert_rgb": only(True),
        "data_format": only("channels_first"),
        "image_processor_type": KeyRule("text", lambda _: True),  # `read_pictures` checks the value
        "feature_extractor_type": KeyRule("text", lambda _: True),
    }


def _size_rule(effective: Mapping[str, Any], side: int) -> KeyRule:
    """Return the rule for `size`, which depends on whether the processor crops pictures.

    Args:
        effective: all settings of the processor, including defaults.
        side: side of the pictures in config.json, in pixels.
    """
    crop = effective["do_center_crop"] is True

    def supports(value: Any) -> bool:
        if crop and _square(effective.get("crop_size")) != side:
            return False
        return _square(value, effective) == side or (crop and _shorter_side(value, effective) == side)

    cropped = f", or {{'shortest_edge': {side}}}; and crop_size must be {side}" if crop else ""
    return KeyRule(f"the image_size in config.json, {{'height': {side}, 'width': {side}}}{cropped}", supports)


def _square(size: Any, effective: Mapping[str, Any] | None = None) -> int | None:
    """Return the side of a square, or None if a value of `size` is not a square.

    If `effective` is given, its `default_to_square` decides whether a single number means a square.
    """
    if isinstance(size, list) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    if isinstance(size, Mapping) and {*size} == {"height", "width"} and size["height"] == size["width"]:
        size, effective = size["height"], None
    single = isinstance(size, int) and not isinstance(size, bool)
    return size if single and (effective is None or effective["default_to_square"] is True) else None


def _shorter_side(size: Any, effective: Mapping[str, Any]) -> int | None:
    """Return the length to which a value of `size` scales the shorter side of a picture. Return None if the value sets
    both sides.
    """
    if isinstance(size, Mapping) and {*size} == {"shortest_edge"}:
        return _square(size["shortest_edge"])
    return size if isinstance(size, int) and effective["default_to_square"] is False else None


def _image_values(effective: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of our image config, and the keys that determine each value.

    Our model divides a pixel by 255, subtracts the mean and divides by the standard deviation. If the other library
    multiplies a pixel by another number, or does not normalise, the returned mean and standard deviation give the same
    result as in the other library.
    """
    factor = 255.0 * (effective["rescale_factor"] if effective["do_rescale"] else 1)
    usual = math.isclose(factor, 1.0, rel_tol=1e-9)
    factor = 1.0 if usual else float(factor)
    names = [] if usual else ["rescale_factor" if effective["do_rescale"] else "do_rescale"]
    mean, std = ([0.0] * 3, [1.0] * 3)
    if effective["do_normalize"]:
        mean, std = effective["image_mean"], effective["image_std"]
    values = {
        "mean": tuple(value / factor for value in mean),
        "std": tuple(value / factor for value in std),
        "filter": FILTERS[effective["resample"]],
        "resize": "stretch",
    }
    if effective["do_center_crop"] and _square(effective["size"], effective) is None:
        values |= {"resize": "crop", "crop_start": "down"}
    normal = effective["do_normalize"]
    sources = {
        "mean": " with ".join(["image_mean" if normal else "do_normalize", *names]),
        "std": " with ".join(["image_std" if normal else "do_normalize", *names]),
        "filter": "resample",
        "resize": "size with do_center_crop",
        "crop_start": "do_center_crop",
    }
    return values, sources


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, tuple):
        return all(math.isclose(one, other, rel_tol=1e-9) for one, other in zip(ours, theirs, strict=True))
    return bool(ours == theirs)


# ------------------------------------------------------------------------------------------------ export


def write_pictures(config: ModelConfig, family: Family) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """Describe the preprocessing of a model's pictures for an export in the format of transformers.

    Returns:
        The content of preprocessor_config.json, and the settings of the model that the file cannot describe, as a dict
        from the reason to the settings. The content is empty if transformers cannot preprocess pictures as the model
        does.
    """
    image, kind = config.image, family.image_processor
    if not kind:
        return {}, {}
    if image.resize == "pad":
        return {}, {"transformers has no resize that fills the empty area with white": ("image.resize",)}
    square = {"height": image.size, "width": image.size}
    content: dict[str, Any] = {"do_resize": True, "size": square, "do_center_crop": False}
    unwritten: dict[str, tuple[str, ...]] = {}
    if kind == "Siglip2ImageProcessor":
        patch_size = value_at("vision.stem.patch_size")(config)
        patches = (image.size // patch_size) ** 2
        content = {"do_resize": True, "patch_size": patch_size, "max_num_patches": patches}
        unwritten["Siglip2ImageProcessor does not change the shape of a picture"] = ("image.resize",)
    elif image.resize == "crop":
        kind = "CLIPImageProcessor"  # the only class of transformers in all versions that crops pictures
        content |= {"size": {"shortest_edge": image.size}, "do_center_crop": True, "crop_size": square}
        if image.crop_start != "down":
            unwritten["transformers rounds the position of a crop down"] = ("image.crop_start",)
    content |= {
        "image_processor_type": kind,
        "resample": {name: number for number, name in FILTERS.items()}[image.filter],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }
    if family.part == "model":
        model_class = str(family.fixed_settings["architectures"][0])
        content["processor_class"] = model_class.replace("ForConditionalGeneration", "Processor")
        content["image_seq_length"] = config.num_slots
    return content, unwritten
