"""A laptop as a platform: embedded Spark with Delta, SQLite MLflow and CPU ranks, all in one home folder."""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.config import LocalPlatformConfig
from pipelines.errors import UserError
from pipelines.platform.jars import delta_jars
from pipelines.platform.platform import Launch, Platform

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

logger = logging.getLogger(__name__)

MIN_JAVA = 17
LOOPBACK = "127.0.0.1"
SHORT_JOBS = "-XX:TieredStopAtLevel=1 -XX:+UseParallelGC -XX:MetaspaceSize=256m -XX:ReservedCodeCacheSize=240m"
"""JVM options for short jobs on few cores: the second compiler would take more time than its code gives back; pictures
are "humongous" to the default collector, which handles badly what outgrows half of one of its regions; and Spark's
classes, some 150 MB, would have the whole heap collected each time that their space grows."""

OFF_HEAP = "1g"
"""Memory of a driver or executor beside its heap."""


def home() -> Path:
    """Where a laptop keeps everything: $LAKESIGHT_HOME, or .lakesight in the working directory."""
    return Path(os.environ.get("LAKESIGHT_HOME") or ".lakesight").absolute()


def local(config: LocalPlatformConfig) -> Platform:
    """A laptop: embedded Spark, Delta and SQLite MLflow, all under `home()`.

    Raises:
        UserError: the home folder cannot be created or written to.
    """
    root = home()
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            "the Lakesight home folder cannot be written to",
            where=str(root),
            got=str(error.strerror or error),
            fix="set LAKESIGHT_HOME to a folder you may write to",
        ) from None
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"
    return Platform(
        kind="local",
        open_spark=lambda: _local_session(config, root),
        namespace="lakesight",
        root=root,
        remote=config.spark.master.startswith("spark://"),
        tables=root / "warehouse",
        launch=Launch(config.ranks, local_mode=config.spark.master.startswith("local["), use_gpu=False),
        tracking_uri=uri,
        registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri,
        model_prefix="",
        experiment_prefix="lakesight/",
    )


def _local_session(config: LocalPlatformConfig, root: Path) -> SparkSession:
    """This process's Spark with Delta, started on first use and stopped at exit.

    All that the JVM prints goes to `<root>/logs/spark.log`: a newcomer sees no noise, `--json` keeps stdout to itself,
    and a start that fails is told in one paragraph.

    Raises:
        UserError: PySpark or Java is missing or too old, the JVM cannot start, or this process already runs the
            session of another home folder.
    """
    try:
        from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
        from pyspark import SparkConf, SparkContext
        from pyspark.errors import PySparkRuntimeError
        from pyspark.java_gateway import launch_gateway
        from pyspark.sql import SparkSession
    except ImportError:
        raise UserError(
            "PySpark is not installed", where=sys.executable, fix="pip install 'lakesight[local]'"
        ) from None

    if SparkContext._active_spark_context is not None:
        return _of_same_home(SparkSession.builder.getOrCreate(), root)
    check_java()
    _prepare_environment(config.spark.master)
    log = root / "logs" / "spark.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    logger.info("starting Spark on %s, log in %s", config.spark.master, log)
    logging.getLogger("py4j").setLevel(logging.WARNING)  # it reports every closed connection at INFO
    with delta_jars() as jars, log.open("ab") as sink:
        conf = SparkConf(loadDefaults=False).setAll(list((_session_settings(config, root) | jars.settings()).items()))
        start = sink.tell()
        try:
            # A JVM that an earlier, stopped session of this process left behind serves the next one too.
            gateway = SparkContext._gateway or launch_gateway(conf, {"stdout": sink, "stderr": sink})  # type: ignore[no-untyped-call]
            spark = SparkSession(SparkContext(conf=conf, gateway=gateway))
        except (PySparkRuntimeError, Py4JJavaError) as error:
            raise _start_failure(log, start, error) from None
        jars.note(spark.sparkContext.getConf().get("spark.jars") or "")
    atexit.register(_stop, spark, config.spark.master, spark.sparkContext.applicationId)
    return spark


def _stop(spark: SparkSession, master: str, application: str) -> None:
    """Stop Spark. Executors of `local-cluster` each leave a copy of all jars inside the installed pyspark: removed."""
    import pyspark

    spark.stop()
    if master.startswith("local-cluster"):
        spark_home = Path(os.environ.get("SPARK_HOME") or Path(pyspark.__file__).parent)
        shutil.rmtree(spark_home / "work" / application, ignore_errors=True)


def _of_same_home(spark: SparkSession, root: Path) -> SparkSession:
    serves = spark.conf.get("spark.lakesight.home", "none")
    if serves != str(root):
        raise UserError(
            "this process already runs a Spark session of another home folder",
            where=str(root),
            got=str(serves),
            fix="stop that session first, or use another process",
        )
    return spark


def _prepare_environment(master: str) -> None:
    """Environment that the JVM and the Python workers inherit; workers would else be the python3 on PATH."""
    if master.startswith("spark://"):
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    else:
        os.environ["PYSPARK_PYTHON"] = sys.executable
        os.environ["SPARK_LOCAL_IP"] = LOOPBACK


def _session_settings(config: LocalPlatformConfig, root: Path) -> dict[str, str]:
    partitions = str(config.spark.shuffle_partitions)
    settings = {
        "spark.app.name": "lakesight",
        "spark.master": config.spark.master,
        "spark.driver.memory": config.spark.driver_memory,
        "spark.driver.extraJavaOptions": SHORT_JOBS,
        "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
        "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
        "spark.sql.warehouse.dir": str(root / "warehouse"),
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.shuffle.partitions": partitions,
        "spark.databricks.delta.snapshotPartitions": partitions,
        # VACUUM lists a table's folder in as many tasks as this says: 10,000, else.
        "spark.sql.sources.parallelPartitionDiscovery.parallelism": partitions,
        # Rows with pictures, and what sorts and shuffles them, outside the heap: else collecting garbage copies them.
        "spark.memory.offHeap.enabled": "true",
        "spark.memory.offHeap.size": OFF_HEAP,
        "spark.sql.columnVector.offheap.enabled": "true",
        # With 100, as it is else, what one query compiles is forgotten by the time that the same query comes again.
        "spark.sql.codegen.cache.maxEntries": "1000",
        # Local files have a checksum for as many bytes, and are written by as much at a time: 512, else.
        "spark.hadoop.file.bytes-per-checksum": "65536",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        # The second in which a session starts names its executors' folder, else: two at once would share one.
        "spark.deploy.appIdPattern": f"app-%s-%04d-{os.getpid()}",
        "spark.python.worker.reuse": "true",
        "spark.lakesight.home": str(root),
    }
    if not config.spark.master.startswith("spark://"):
        settings |= {"spark.driver.host": LOOPBACK, "spark.driver.bindAddress": LOOPBACK}
        settings |= {"spark.executor.extraJavaOptions": SHORT_JOBS}
        settings |= {"spark.sql.adaptive.enabled": "false"}  # with few partitions it only makes a job of every stage
    return settings


def check_java() -> int:
    """The major version of the Java that Spark will start.

    Raises:
        UserError: none, or one older than Spark can run on. PySpark itself would print a shell error or a traceback.
    """
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else "java"
    try:
        run = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
        found = re.search(r'version "(?:1\.)?(\d+)', run.stderr + run.stdout)
        got = (run.stderr or run.stdout).partition("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        found, got = None, str(error)
    if found and int(found[1]) >= MIN_JAVA:
        return int(found[1])
    raise UserError(
        f"Spark needs Java {MIN_JAVA} or later",
        where=f"JAVA_HOME={home}" if home else "java on PATH",
        got=got or "nothing",
        fix="install a JDK (Debian and Ubuntu: apt install openjdk-17-jre-headless; macOS: brew install openjdk@17; "
        "conda: conda install openjdk=17) and point JAVA_HOME to it",
    )


def _start_failure(log: Path, start: int, error: Exception) -> UserError:
    """What went wrong, from what the JVM printed since byte `start` of its log."""
    printed = log.read_bytes()[start:].decode(errors="replace")
    if "unresolved dependency" in printed or "download failed" in printed:
        return UserError(
            "Spark could not fetch the Delta Lake jars",
            where=str(log),
            got="Maven Central did not serve them",
            fix="the first start needs the internet; later ones take the jars from Ivy's cache in the home folder",
        )
    lines = [line.strip("# ") for line in printed.splitlines() if re.search(r"Exception|rror:|Could not reserve", line)]
    roots = [line for line in lines if line.startswith("Caused by: ")]
    got = (roots[-1:] or lines[:1] or [f"{type(error).__name__}, and no reason in the log"])[0]
    return UserError(
        "Spark did not start",
        where=str(log),
        got=got[:500],
        fix="correct what it names (memory, master, a full disk); the log has all of it",
    )
