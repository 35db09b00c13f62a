"""The shape of a model as data: every axis of variation is a small frozen config, picked by `kind`.

Families are points in this space (YAML under conf/model/), never classes. Imports neither torch nor Spark, so the
driver, the executors and the command line can read a model's shape for free.
"""

from vlm.config.adapter import AdapterConfig, Pattern
from vlm.config.base import Config, Probability, differences, why_unreadable
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
from vlm.config.precision import Precision
from vlm.config.schedule import (
    ConstantScheduleConfig,
    CosineScheduleConfig,
    LinearScheduleConfig,
    ScheduleConfig,
    StableScheduleConfig,
)
from vlm.config.text import BpeConfig, CharsConfig, JsonTextConfig, TextConfig
from vlm.config.transformer import (
    Activation,
    AttentionConfig,
    DenseMlpConfig,
    GatedMlpConfig,
    LayerNormConfig,
    LearnedPositionConfig,
    MlpConfig,
    MoeMlpConfig,
    NormConfig,
    PlainMlpConfig,
    PositionConfig,
    RmsNormConfig,
    RotaryPositionConfig,
    TransformerConfig,
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
    "Activation",
    "AdapterConfig",
    "AttentionConfig",
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
    "differences",
    "why_unreadable",
]
