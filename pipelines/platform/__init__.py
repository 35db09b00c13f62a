"""Where a run happens: the only package that knows a laptop from a Databricks workspace.

Start reading in `platform.py`, which holds the questions; `local.py` and `databricks.py` hold the answers. The user
chooses with `--platform`; nothing is guessed from the environment. pyspark is imported inside functions alone.
"""

from pipelines.config import LocalPlatformConfig, PlatformConfig
from pipelines.platform.databricks import databricks
from pipelines.platform.local import check_java, local
from pipelines.platform.platform import FolderKind, Launch, Platform, shown_uri

__all__ = ["FolderKind", "Launch", "Platform", "check_java", "databricks", "local", "open_platform", "shown_uri"]


def open_platform(config: PlatformConfig) -> Platform:
    """Open the platform that a resolved config names."""
    return local(config) if isinstance(config, LocalPlatformConfig) else databricks(config)
