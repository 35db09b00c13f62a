"""Description of the place where a run happens: a laptop or a Databricks workspace.

Start reading in `platform.py`, which defines `Platform`; `local.py` and `databricks.py` construct a `Platform`. The
package imports pyspark only inside functions, and `session.py` hides how Connect sessions differ from classic sessions.
"""

from pipelines.config import LocalPlatformConfig, PlatformConfig
from pipelines.platform.databricks import app_port, databricks
from pipelines.platform.local import check_java, jvm_failure, local
from pipelines.platform.platform import FolderKind, Launch, Platform, sqlite_uri, user_name
from pipelines.platform.session import (
    allow_urls,
    analysed,
    call_in_barrier_stage,
    cancel_if_slots_are_lost,
    count_slots,
    default_parallelism,
    is_connect,
    spark_errors,
    stop_session,
    task_cpus,
)

__all__ = [
    "FolderKind",
    "Launch",
    "Platform",
    "allow_urls",
    "analysed",
    "app_port",
    "call_in_barrier_stage",
    "cancel_if_slots_are_lost",
    "check_java",
    "count_slots",
    "databricks",
    "default_parallelism",
    "is_connect",
    "jvm_failure",
    "local",
    "open_platform",
    "spark_errors",
    "sqlite_uri",
    "stop_session",
    "task_cpus",
    "user_name",
]


def open_platform(config: PlatformConfig) -> Platform:
    """Construct the platform that the platform config describes."""
    return local(config) if isinstance(config, LocalPlatformConfig) else databricks(config)
