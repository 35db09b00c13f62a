"""Where a run happens: the only package that distinguishes a laptop from a Databricks workspace.

Start reading in `platform.py`; `local.py` and `databricks.py` construct its `Platform`, which the user chooses with
`--platform`. pyspark is imported only inside functions.
"""

from pipelines.config import LocalPlatformConfig, PlatformConfig
from pipelines.platform.databricks import databricks
from pipelines.platform.local import check_java, local
from pipelines.platform.platform import FolderKind, Launch, Platform, redact_uri

__all__ = ["FolderKind", "Launch", "Platform", "check_java", "databricks", "local", "open_platform", "redact_uri"]


def open_platform(config: PlatformConfig) -> Platform:
    """Construct the platform that a resolved config names."""
    return local(config) if isinstance(config, LocalPlatformConfig) else databricks(config)
