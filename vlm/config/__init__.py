"""Configuration of a model: one small frozen pydantic class for each part, with variants selected by `kind`.

Start reading in `model.py`, whose `ModelConfig` contains all other configs; conf/model/ has the YAML files of all
models that ship with Lakesight. This package imports neither torch nor Spark, so the driver, the executors and the
commands load the package quickly.
"""

from vlm.config.adapter import AdapterConfig, Pattern
from vlm.config.base import ADDED_LATER, Config, Probability, config_differences, read_error_message
from vlm.config.image import ImageConfig
from vlm.config.model import (
    CausalMaskConfig,
    CrossFusionConfig,
    DecoderConfig,
    FusionConfig,
    GenerationConfig,
    MaskConfig,
    ModelConfig,
    PrefixMaskConfig,
    SlotsFusionConfig,
)
from vlm.config.model_file import read_model_config
from vlm.config.precision import Precision
from vlm.config.schedule import (
    ConstantScheduleConfig,
    CosineScheduleConfig,
    LinearScheduleConfig,
    ScheduleConfig,
    StableScheduleConfig,
)
from vlm.config.text import BpeConfig, CharsConfig, JsonTextConfig, TextConfig, WordsConfig
from vlm.config.transformer import (
    Activation,
    AttentionConfig,
    AxialPositionConfig,
    DenseMlpConfig,
    GatedMlpConfig,
    LayerNormConfig,
    LearnedPositionConfig,
    MixedPositionConfig,
    MlpConfig,
    MoeMlpConfig,
    NormConfig,
    PlainMlpConfig,
    PositionConfig,
    RelativePositionConfig,
    RmsNormConfig,
    RotaryPositionConfig,
    TransformerConfig,
    adds_position_vectors,
)
from vlm.config.vision import (
    ConvStemConfig,
    LinearProjectorConfig,
    MlpProjectorConfig,
    PatchStemConfig,
    PixelShuffleProjectorConfig,
    ProjectorConfig,
    ResamplerProjectorConfig,
    StemConfig,
    VisionConfig,
)

__all__ = [
    "ADDED_LATER",
    "Activation",
    "AdapterConfig",
    "AttentionConfig",
    "AxialPositionConfig",
    "BpeConfig",
    "CausalMaskConfig",
    "CharsConfig",
    "Config",
    "ConstantScheduleConfig",
    "ConvStemConfig",
    "CosineScheduleConfig",
    "CrossFusionConfig",
    "DecoderConfig",
    "DenseMlpConfig",
    "FusionConfig",
    "GatedMlpConfig",
    "GenerationConfig",
    "ImageConfig",
    "JsonTextConfig",
    "LayerNormConfig",
    "LearnedPositionConfig",
    "LinearProjectorConfig",
    "LinearScheduleConfig",
    "MaskConfig",
    "MixedPositionConfig",
    "MlpConfig",
    "MlpProjectorConfig",
    "ModelConfig",
    "MoeMlpConfig",
    "NormConfig",
    "PatchStemConfig",
    "Pattern",
    "PixelShuffleProjectorConfig",
    "PlainMlpConfig",
    "PositionConfig",
    "Precision",
    "PrefixMaskConfig",
    "Probability",
    "ProjectorConfig",
    "RelativePositionConfig",
    "ResamplerProjectorConfig",
    "RmsNormConfig",
    "RotaryPositionConfig",
    "ScheduleConfig",
    "SlotsFusionConfig",
    "StableScheduleConfig",
    "StemConfig",
    "TextConfig",
    "TransformerConfig",
    "VisionConfig",
    "WordsConfig",
    "adds_position_vectors",
    "config_differences",
    "read_error_message",
    "read_model_config",
]
