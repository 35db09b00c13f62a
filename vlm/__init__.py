"""Model library: configuration, layers, tokenizers, training and generation of vision-language models.

`vlm.load` and `vlm.build` return a `Captioner`; the modules that need PyTorch are imported on first use, so that
`import vlm` needs no PyTorch. Start reading in `model.py` (the forward pass) and `factory.py` (construction of a model
from its config); no module imports `pipelines`, Spark or MLflow.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from vlm.captioner import Captioner
    from vlm.config import GenerationConfig, ModelConfig
    from vlm.generation.attention_maps import AttentionMaps
    from vlm.generation.logprobs import AnswerLogprobs
    from vlm.generation.result import CaptionResult

__all__ = [
    "AnswerLogprobs",
    "AttentionMaps",
    "CaptionResult",
    "Captioner",
    "GenerationConfig",
    "ModelConfig",
    "build",
    "load",
]

_MODULES = {
    "AnswerLogprobs": "vlm.generation.logprobs",
    "AttentionMaps": "vlm.generation.attention_maps",
    "CaptionResult": "vlm.generation.result",
    "Captioner": "vlm.captioner",
    "GenerationConfig": "vlm.config",
    "ModelConfig": "vlm.config",
}


def load(
    path: str | PathLike[str], *, device: str | int | torch.device | None = None, precision: str = "fp32"
) -> Captioner:
    """Load a model from a folder, and return a captioner that uses the model.

    The folder is one of:

    - a checkpoint, or a model version in `models/` of the home folder;
    - a run folder, whose newest checkpoint is loaded;
    - the MLflow folder of a registered version;
    - a published PaliGemma 1 or 2 in the format of transformers: config.json, safetensors files and tokenizer.json.

    Nothing is downloaded: a published model must already be on this machine.

    Args:
        path: folder that holds the model.
        device: torch device, such as `cpu` or `cuda:1`; by default the GPU if there is one.
        precision: number format to which the weights are converted (fp32, bf16, fp16, int8 or int4).

    Raises:
        ArgumentError: an argument has a wrong type, or this machine does not have the device.
        CheckpointError: the folder has no model, or its files are damaged or do not fit together.
        ConfigError: the precision is unknown, or the tokenizer of a published model does not fit the model.
        UserError: the precision needs torchao, and torchao is not installed; or a weight is too large for fp16.

    Example:
        >>> import tempfile, vlm
        >>> folder = tempfile.mkdtemp()
        >>> vlm.build("nano_tiny", ["a red square"]).save(folder)
        >>> vlm.load(folder, device="cpu").model.config.image.size
        32
    """
    from vlm.captioner import Captioner
    from vlm.checkpoint import best_device, find_checkpoint, load_model
    from vlm.inputs import existing_folder
    from vlm.precision import find_device, find_precision, set_precision
    from vlm.weights.published_model import is_published, load_published

    chosen, target = find_precision(precision), best_device() if device is None else find_device(device)
    folder = find_checkpoint(existing_folder(path, "path"))
    model, tokenizer = load_published(folder) if is_published(folder) else load_model(folder)
    set_precision(model, chosen, target)
    return Captioner(model, tokenizer)


def build(
    config: ModelConfig | Mapping[str, Any] | str | Path, texts: Iterable[str] = (), *, seed: int = 0
) -> Captioner:
    """Build a model with random weights, and return a captioner that uses the model.

    Args:
        config: model config, a mapping with the same keys, the name of a model such as `nano`, or the path of a YAML
            file. A model in `conf/model/` of the working directory takes precedence over a model of the same name that
            ships with Lakesight.
        texts: example captions from which the tokenizer is learned if `text.kind` is bpe or words.
        seed: random seed of the weights, from -2**63 to 2**64 - 1.

    Raises:
        ArgumentError: an argument has a wrong type, or the seed is out of range.
        ConfigError: the config is invalid, its file cannot be read, or the tokenizer cannot be built from the config
            and the texts.

    Example:
        >>> import vlm
        >>> captioner = vlm.build("nano_tiny", ["a red square", "a blue circle"])
        >>> sum(parameter.numel() for parameter in captioner.model.parameters())
        104544
    """
    import torch

    from vlm import text
    from vlm.captioner import Captioner
    from vlm.config import read_model_config
    from vlm.factory import build_model
    from vlm.inputs import SEEDS, example_texts, whole_number

    settings, number = read_model_config(config), whole_number(seed, "seed", SEEDS)
    tokenizer = text.learn(settings.text, example_texts(texts, "texts"))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(number)
        model = build_model(settings, tokenizer.vocab_size)
    return Captioner(model.eval(), tokenizer)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'vlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
