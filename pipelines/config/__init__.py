"""Settings of a run: the YAML files under `conf/`, which are validated before any work starts.

Start reading in `run.py`, which resolves four names (model, data, train, platform) into a `RunConfig`. The package
never imports torch, Spark or MLflow.
"""

from pipelines.config.augment import AugmentConfig
from pipelines.config.data import (
    PICTURE,
    PICTURE_FOLDER,
    ColumnNames,
    CsvSourceConfig,
    DataConfig,
    FolderSourceConfig,
    JsonlSourceConfig,
    LimitsConfig,
    ParquetSourceConfig,
    RowSourceBase,
    ShardConfig,
    SourceConfig,
    TableSourceConfig,
    TextSourceConfig,
    TextWeights,
    WebDatasetSourceConfig,
)
from pipelines.config.gate import DriftConfig, GateConfig, Trial
from pipelines.config.overrides import model_overrides
from pipelines.config.run import (
    Chosen,
    DatabricksPlatformConfig,
    LocalPlatformConfig,
    PlatformConfig,
    RunConfig,
    SparkConfig,
    available,
    conf_folders,
    load_model,
    load_run,
    short_hash,
)
from pipelines.config.split import ColumnSplitConfig, FileSplitConfig, HashSplitConfig, Split, SplitConfig
from pipelines.config.train import GroupConfig, OptimizerConfig, StageConfig, TrainConfig

__all__ = [
    "PICTURE",
    "PICTURE_FOLDER",
    "AugmentConfig",
    "Chosen",
    "ColumnNames",
    "ColumnSplitConfig",
    "CsvSourceConfig",
    "DataConfig",
    "DatabricksPlatformConfig",
    "DriftConfig",
    "FileSplitConfig",
    "FolderSourceConfig",
    "GateConfig",
    "GroupConfig",
    "HashSplitConfig",
    "JsonlSourceConfig",
    "LimitsConfig",
    "LocalPlatformConfig",
    "OptimizerConfig",
    "ParquetSourceConfig",
    "PlatformConfig",
    "RowSourceBase",
    "RunConfig",
    "ShardConfig",
    "SourceConfig",
    "SparkConfig",
    "Split",
    "SplitConfig",
    "StageConfig",
    "TableSourceConfig",
    "TextSourceConfig",
    "TextWeights",
    "TrainConfig",
    "Trial",
    "WebDatasetSourceConfig",
    "available",
    "conf_folders",
    "load_model",
    "load_run",
    "model_overrides",
    "short_hash",
]
