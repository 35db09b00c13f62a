"""Description of the place where a run happens: a laptop or a Databricks workspace.

Start reading in `platform.py`, which defines `Platform`; `local.py` and `databricks.py` each construct a `Platform`.
pyspark is imported only inside functions.
"""

from pipelines.config import LocalPlatformConfig, PlatformConfig
from pipelines.platform.databricks import databricks
from pipelines.platform.local import check_java, local
from pipelines.platform.platform import FolderKind, Launch, Platform, redact_uri, sqlite_uri, user_name

__all__ = [
    "FolderKind",
    "Launch",
    "Platform",
    "check_java",
    "databricks",
    "local",
    "open_platform",
    "redact_uri",
    "sqlite_uri",
    "user_name",
]


def open_platform(config: PlatformConfig) -> Platform:
    """Construct the platform that the platform config describes."""
    return local(config) if isinstance(config, LocalPlatformConfig) else databricks(config)
