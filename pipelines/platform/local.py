"""Construction of the `Platform` for a laptop, and start of its Spark session."""

from __future__ import annotations

import atexit
import locale
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.child_process import WORKER_VARIABLES
from pipelines.config import LocalPlatformConfig, SparkConfig
from pipelines.errors import StageFailed, UserError
from pipelines.platform.class_archive import DRIVER_OPTIONS, ClassArchive, class_archive
from pipelines.platform.connect_session import open_connect_session
from pipelines.platform.jars import delta_jars
from pipelines.platform.platform import Launch, Platform, sqlite_uri
from pipelines.platform.session import jvm_exit_code, quiet_loggers, stop_session
from pipelines.platform.spark_launch import check_address, crash_options, open_log, private_settings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

logger = logging.getLogger(__name__)

MIN_JAVA = 17
MIN_OPEN_FILES = 1024
"""If the hard limit of open files is below this number, the error of a failed Spark start gives the limit as the
cause."""
LOOPBACK = "127.0.0.1"
KUBERNETES, HTTPS_PORT = "k8s://", 443
SAFE_PATH = "PYTHONSAFEPATH"
SHORT_JOBS = (
    "-XX:TieredStopAtLevel=1 -XX:+UseParallelGC -XX:MaxNewSize=256m -XX:MetaspaceSize=256m "
    "-XX:ReservedCodeCacheSize=240m"
)
"""JVM options for short jobs on few cores.

The JVM's second compiler is switched off, because it takes more time than its faster code saves. The default garbage
collector (G1) is not used, because it is slow with objects larger than half a region, such as pictures. Without a
limit, the space for new objects would grow to a third of the heap, which would save no processor time. With a limit on
the space for new objects, the JVM takes 0.8 GB instead of 1.9 GB after four small ingests. Spark's classes need about
150 MB of metaspace. The metaspace starts with 256 MB, because each growth of the metaspace triggers a garbage
collection of the whole heap.
"""

EXECUTOR_OPTIONS = "spark.executor.extraJavaOptions"
DAEMON_MODULE = "spark.python.daemon.module"
PYTHON_DAEMON = "pipelines.executor.python_daemon"
"""Module that starts Spark's Python workers without the credentials of the driver."""
NEVER = "3650d"
"""Timeout that is never reached, in Spark's notation."""
TOO_LITTLE_MEMORY = r"OutOfMemoryError|insufficient memory|memory allocation|Could not reserve"
"""Pattern of the lines with which the JVM reports that it got too little memory."""
LOG_TAIL = 2**12
"""Number of bytes at the end of Spark's log that are searched for the reason why the JVM has ended."""
OFF_HEAP = "1g"
"""Memory that a Spark driver or executor uses outside its JVM heap."""


def home() -> Path:
    """Return the folder for all data on a laptop: $LAKESIGHT_HOME, or .lakesight in the working folder.

    Raises:
        UserError: LAKESIGHT_HOME is a URL.
    """
    given = os.environ.get("LAKESIGHT_HOME") or ".lakesight"
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", given):
        raise UserError(
            "the Lakesight home folder must be a folder, not a URL",
            where="LAKESIGHT_HOME",
            got=given,
            fix="give the path of a folder on a disk or on a mounted file system, because ranks map shards into memory "
            "and MLflow keeps an SQLite file in the home folder; only sources may be on an object store",
        )
    return Path(given).absolute()


def local(config: LocalPlatformConfig) -> Platform:
    """Describe a laptop: Spark, Delta tables in `home()`, and MLflow, by default with an SQLite file in `home()`.

    Raises:
        UserError: the home folder is a URL, or cannot be created or written.
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
    uri = os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(root / "mlflow.db")
    return Platform(
        kind="local",
        open_spark=lambda: (
            open_connect_session(config.spark, root) if config.spark.is_connect else open_local_session(config, root)
        ),
        namespace="lakesight",
        root=root,
        remote=not config.spark.is_on_this_machine,
        tables=root / "warehouse",
        launch=Launch(config.ranks, local_mode=config.spark.master.startswith("local["), use_gpu=False),
        tracking_uri=uri,
        registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri,
        model_prefix="",
        experiment_prefix="lakesight/",
        shared_experiment=None,
    )


def open_local_session(config: LocalPlatformConfig, root: Path) -> SparkSession:
    """Return this process's Spark session with Delta. The first call starts the session, which is stopped at exit.

    The JVM prints to `<root>/logs/spark.log`, so that stdout contains only the JSON of `--json`, and a failed start is
    reported in one paragraph.

    Raises:
        UserError: PySpark is missing, Java is missing or too old, the JVM cannot start, the API server of Kubernetes
            does not answer, or this process already runs a Spark session for another home folder.
    """
    try:
        from py4j.protocol import Py4JError  # type: ignore[import-untyped]
        from pyspark import SparkConf, SparkContext
        from pyspark.errors import PySparkRuntimeError
        from pyspark.java_gateway import launch_gateway
        from pyspark.sql import SparkSession
    except ImportError:
        raise UserError(
            "PySpark is not installed", where=sys.executable, fix="pip install 'lakesight[local]'"
        ) from None

    if SparkContext._active_spark_context is not None:
        return _require_same_home(SparkSession.builder.getOrCreate(), root)
    java = java_version()
    if config.spark.master.startswith(KUBERNETES):
        check_address(_kubernetes_address(config.spark.master), HTTPS_PORT, "the API server of Kubernetes")
    _prepare_environment(config.spark)
    log = root / "logs" / "spark.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    logger.info("starting Spark with master %s; its log is %s", config.spark.master, log)
    quiet_loggers()
    with delta_jars() as jars, open_log(log, _umask()) as sink:
        settings = session_settings(config, root) | jars.settings()
        archive = None
        if jars.paths and settings[DRIVER_OPTIONS] == SHORT_JOBS:
            archive = class_archive(java, SHORT_JOBS, _spark_home() / "jars", jars.paths)
        settings[DRIVER_OPTIONS] += archive.java_options() if archive else ""
        options = (DRIVER_OPTIONS, EXECUTOR_OPTIONS) if config.spark.is_on_this_machine else (DRIVER_OPTIONS,)
        for option in options:
            settings[option] += crash_options(log.parent / "crashes", settings[option], _umask())
        conf = SparkConf(loadDefaults=False).setAll(list(settings.items()))
        start = sink.tell()
        try:
            # If this process has stopped a Spark session before, the JVM of that session is used again.
            with private_settings(settings):
                gateway = SparkContext._gateway or launch_gateway(None, {"stdout": sink, "stderr": sink})  # type: ignore[no-untyped-call]
            spark = SparkSession(context := SparkContext(conf=conf, gateway=gateway))
            if settings.get(DAEMON_MODULE) == PYTHON_DAEMON:
                context.environment[WORKER_VARIABLES] = ",".join(context.environment)
        except (PySparkRuntimeError, Py4JError, ConnectionError) as error:
            raise _start_failure(log, start, error) from None
        # By default, the thread that receives accumulators prints a traceback when the JVM ends. The traceback is not
        # needed, because commands report the end in one paragraph (`jvm_failure`).
        spark.sparkContext._accumulatorServer.handle_error = lambda *_: None  # type: ignore[method-assign]
        jars.save(spark.sparkContext.getConf().get("spark.jars") or "")
    if archive:
        atexit.register(archive.build_later)
    atexit.register(_stop, spark, config.spark.master, spark.sparkContext.applicationId)
    return spark


def driver_archive() -> ClassArchive | None:
    """Return the place of the archive (see `class_archive`), or None if the jars of Delta Lake are not known yet."""
    with delta_jars() as jars:
        return class_archive(java_version(), SHORT_JOBS, _spark_home() / "jars", jars.paths) if jars.paths else None


def _spark_home() -> Path:
    """Return the folder of Spark, by default the pyspark package."""
    import pyspark

    return Path(os.environ.get("SPARK_HOME") or Path(pyspark.__file__).parent)


def _stop(spark: SparkSession, master: str, application: str) -> None:
    """Stop Spark, and remove the copies of jars that `local-cluster` executors leave in the folder of Spark."""
    stop_session(spark)
    if master.startswith("local-cluster"):
        shutil.rmtree(_spark_home() / "work" / application, ignore_errors=True)


def _require_same_home(spark: SparkSession, root: Path) -> SparkSession:
    """Return the running Spark session, or raise a UserError if the session belongs to another home folder."""
    found = spark.conf.get("spark.lakesight.home", "none")
    if found != str(root):
        raise UserError(
            "this process already runs a Spark session for another home folder",
            where=str(root),
            got=str(found),
            fix="stop the running Spark session first, or use another process",
        )
    return spark


def _kubernetes_address(master: str) -> str:
    """Return the address of the Kubernetes API server. Spark uses HTTPS if the master names no protocol, as in
    `k8s://host:443`."""
    address = master.removeprefix(KUBERNETES)
    return address if "://" in address else f"https://{address}"


def _prepare_environment(config: SparkConfig) -> None:
    """Set environment variables that the JVM, Spark's Python workers and ranks inherit.

    PYSPARK_PYTHON makes Python workers use this Python instead of the `python3` on PATH. PYTHONSAFEPATH removes the
    working folder from the module search path of processes started with `python -m`. Without PYTHONSAFEPATH, a folder
    `pipelines`, `vlm` or `jobs` of the user would be imported instead of ours. PYTHONPATH still applies. LC_ALL is set
    to a UTF-8 locale if the user's locale is not UTF-8 (`LC_ALL=C` in cron jobs and containers, or a locale that is not
    installed). Without a UTF-8 locale, the JVM replaces each letter outside of ASCII by `?` in the names of files.
    """
    os.environ.setdefault(SAFE_PATH, "1")
    if locale.nl_langinfo(locale.CODESET).upper() != "UTF-8":
        os.environ["LC_ALL"] = "C.UTF-8"
    if config.is_on_this_machine:
        os.environ["PYSPARK_PYTHON"] = sys.executable
        os.environ["SPARK_LOCAL_IP"] = LOOPBACK
    else:
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)


def session_settings(config: LocalPlatformConfig, root: Path) -> dict[str, str]:
    """Return the settings of the Spark session, without the jars. Settings of the user replace our defaults."""
    partitions = str(config.spark.shuffle_partitions)
    settings = {
        "spark.app.name": "lakesight",
        "spark.master": config.spark.master,
        "spark.driver.memory": config.spark.driver_memory,
        DRIVER_OPTIONS: SHORT_JOBS,
        "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
        "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
        "spark.sql.warehouse.dir": str(root / "warehouse"),
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.shuffle.partitions": partitions,
        "spark.databricks.delta.snapshotPartitions": partitions,
        # Number of tasks with which VACUUM lists the folder of a table, instead of Spark's 10,000 tasks.
        "spark.sql.sources.parallelPartitionDiscovery.parallelism": partitions,
        # Keep the data of sorts and shuffles, and rows that contain pictures, outside the heap, so that garbage
        # collection does not copy these data.
        "spark.memory.offHeap.enabled": "true",
        "spark.memory.offHeap.size": OFF_HEAP,
        "spark.sql.columnVector.offheap.enabled": "true",
        # With the default of 100 entries, Spark's cache would drop the compiled code of a query before the same query
        # runs again.
        "spark.sql.codegen.cache.maxEntries": "1000",
        # Number of bytes per checksum and per write call for local files, instead of Hadoop's 512 bytes.
        "spark.hadoop.file.bytes-per-checksum": "65536",
        # Hadoop gets the umask of the process as a setting, because Hadoop sets the permissions of each file explicitly
        # and ignores the umask of the process.
        "spark.hadoop.fs.permissions.umask-mode": f"{_umask():03o}",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        # By default the executors' folder is named after the start time in seconds, so two Spark sessions could share a
        # folder.
        "spark.deploy.appIdPattern": f"app-%s-%04d-{os.getpid()}",
        "spark.python.worker.reuse": "true",
        f"spark.executorEnv.{SAFE_PATH}": os.environ[SAFE_PATH],
        "spark.lakesight.home": str(root),
    }
    if config.spark.master.startswith("local["):
        # Other users of this machine can connect to the loopback device. Without the secret that Spark draws for this
        # session, Spark's ports would deserialize Java objects from anybody.
        settings |= {"spark.authenticate": "true"}
        settings |= {DAEMON_MODULE: PYTHON_DAEMON}
        # Spark measures the time since the last heartbeat by the real-time clock. If the clock jumps ahead, or the
        # machine was suspended, Spark would remove its only executor, which is in the driver itself. The executor
        # cannot register again, so the JVM would exit after 60 more heartbeats, which is ten minutes later.
        settings |= {"spark.storage.blockManagerHeartbeatTimeoutMs": NEVER}
    if config.spark.is_on_this_machine:
        settings |= {"spark.driver.host": LOOPBACK, "spark.driver.bindAddress": LOOPBACK}
        settings |= {EXECUTOR_OPTIONS: SHORT_JOBS}
        # with few partitions, adaptive execution saves no time and runs more jobs
        settings |= {"spark.sql.adaptive.enabled": "false"}
        # without adaptive execution, this time includes the whole query that computes the rows; the value is one day
        settings |= {"spark.sql.broadcastTimeout": "86400"}
    return settings | config.spark.conf


def _umask() -> int:
    """Return the umask of this process. The umask can be read only by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def check_java() -> int:
    """Return the major version of the Java that Spark will start. Raise a UserError as `java_version` does."""
    return _major(java_version())


def _major(printed: str) -> int:
    """Return the major version in the text that `java -version` prints, or 0 if there is none."""
    found = re.search(r'version "(?:1\.)?(\d+)', printed)
    return int(found[1]) if found else 0


def java_version() -> str:
    """Return the text that `java -version` prints for the Java that Spark will start.

    Raises:
        UserError: Java is missing or too old. Without this check, PySpark would print a shell error or a traceback.
    """
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else "java"
    try:
        run = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
        printed = run.stderr + run.stdout
        got = (run.stderr or run.stdout).partition("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        printed, got = "", str(error)
    if _major(printed) >= MIN_JAVA:
        return printed
    raise UserError(
        f"Spark needs Java {MIN_JAVA} or later",
        where=f"JAVA_HOME={home}" if home else "java on PATH",
        got=got or "nothing",
        fix="install a JDK (Debian and Ubuntu: apt install openjdk-17-jre-headless; macOS: brew install openjdk@17; "
        "conda: conda install openjdk=17) and point JAVA_HOME to it",
    )


def _start_failure(log: Path, start: int, error: Exception) -> UserError:
    """Return the error for a failed start of Spark. The JVM's messages of the start are in `log` after byte `start`."""
    printed = log.read_bytes()[start:].decode(errors="replace")
    if "unresolved dependency" in printed or "download failed" in printed:
        return UserError(
            "Spark could not download the Delta Lake jars",
            where=str(log),
            got="Maven Central did not serve the jars",
            fix="connect to the internet for the first start; later starts use Ivy's cache (~/.ivy2*)",
        )
    # Only the hard limit counts, because the JVM raises its own soft limit to the hard limit.
    _, open_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= open_files < MIN_OPEN_FILES:
        return UserError(
            "Spark needs more open files than this process may open",
            where="the hard limit of open files (ulimit -Hn)",
            got=str(open_files),
            fix=f"raise the limit to {MIN_OPEN_FILES} or more, because Spark alone opens hundreds of jars",
        )
    lines = [
        line.strip("# ") for line in printed.splitlines() if re.search(f"Exception|rror:|{TOO_LITTLE_MEMORY}", line)
    ]
    roots = [line for line in lines if line.startswith("Caused by: ")]
    got = (roots[-1:] or lines[:1] or [f"{type(error).__name__}, and no reason in the log"])[0]
    return UserError(
        "Spark did not start",
        where=str(log),
        got=got[:500],
        fix="read the log, and remove the cause, such as too little memory, a wrong master or a full disk",
    )


def jvm_failure(root: Path) -> StageFailed | None:
    """Return the error for a JVM of Spark that has ended by itself or was killed, or None if no JVM has ended.

    The errors that PySpark raises without its JVM say only that a connection was closed or refused.
    """
    code = jvm_exit_code()
    if code is None:
        return None
    log = root / "logs" / "spark.log"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL))
        lines = file.read().decode(errors="replace").splitlines()
    # A JVM that is killed by SIGKILL logs nothing, so a line that an earlier JVM has logged must not be shown as the
    # cause.
    said = [line.strip("# ") for line in lines if code != -signal.SIGKILL and re.search(TOO_LITTLE_MEMORY, line)]
    ended = f"it was killed by {signal.Signals(-code).name}" if code < 0 else f"its exit code was {code}"
    return StageFailed(
        "the Java process of Spark has ended",
        where=str(log),
        got=f"{ended}; {said[-1][:300]}" if said else ended,
        fix="the usual cause is too little memory: end other programs, lower platform.spark.driver_memory, or use a "
        "machine with more memory; then run the same command again: finished work is kept",
    )
