"""Program that builds the archive of Spark's classes if there is no archive and no build began in the last 24 hours.

python -m pipelines.platform.build_class_archive
"""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.config import LocalPlatformConfig, SparkConfig
from pipelines.platform.class_archive import DRIVER_OPTIONS, ClassArchive
from pipelines.platform.local import SHORT_JOBS, driver_archive, open_local_session

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

BUILD_SECONDS = 600
"""Time in seconds after which this program is ended. The JVM then ends too, because its stdin is closed."""

STATEMENTS = (
    "create temporary view rows as select id, cast(id as string) as text, array(id) as list, struct(id as a) as pair "
    "from range(20)",
    "create table archive using delta tblproperties ('delta.enableChangeDataFeed' = 'true') as select * from rows",
    "merge into archive t using (select * from rows where id < 5) s on t.id = s.id when matched then update set * "
    "when not matched then insert *",
    "update archive set text = 'new' where id = 7",
    "delete from archive where id = 8",
    "select * from table_changes('archive', 1)",
    "select text, count(distinct id), max(pair) from archive group by text order by text",
    "select *, row_number() over (partition by text order by id) from archive version as of 0",
    "select a.id from archive a join archive b on a.id = b.id left anti join rows r on a.id = r.id",
    "optimize archive",
    "describe detail archive",
    "describe history archive",
)


def build(archive: ClassArchive, folder: Path) -> Path | None:
    """Run Spark once with an empty home folder, and write the archive when Spark's JVM ends.

    Returns:
        Path of the archive, or None if the JVM has written no archive, for example because Java's own class archive is
        missing.
    """
    built = folder / "classes.jsa"
    conf = {DRIVER_OPTIONS: f'{SHORT_JOBS} "-XX:ArchiveClassesAtExit={built}"'}
    config = LocalPlatformConfig(spark=SparkConfig(master="local[2]", driver_memory="1g", conf=conf))
    spark = open_local_session(config, folder / "home")
    use_spark(spark)
    spark.stop()
    process = spark.sparkContext._gateway.proc  # type: ignore[union-attr]
    process.stdin.close()
    complete = process.wait() == 0 and built.exists()
    return archive.save(built) if complete else None


def use_spark(spark: SparkSession) -> None:
    """Run the kinds of queries that the stages run on Delta tables, so that Spark loads the classes for them."""
    for statement in STATEMENTS:
        spark.sql(statement).collect()
    spark.table("rows").write.format("delta").mode("append").saveAsTable("archive")
    table = spark.table("archive")
    table.mapInArrow(lambda batches: batches, table.schema).toArrow()


def main() -> None:
    """Build the archive for this user's JVM with the lowest priority."""
    os.nice(19)
    archive = driver_archive()
    if archive is None or not archive.claim():
        return
    if hasattr(signal, "SIGALRM"):
        signal.alarm(BUILD_SECONDS)
    with tempfile.TemporaryDirectory(prefix="lakesight-classes-", ignore_cleanup_errors=True) as folder:
        build(archive, Path(folder))


if __name__ == "__main__":
    main()
