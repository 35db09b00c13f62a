"""Archive of the Java classes that Spark loads, with which the JVM of a Spark driver starts twice as fast.

The JVM calls this class data sharing. A JVM with an archive maps the parsed classes into memory, and does not read them
from jars. The archive is a file in the user's cache folder. For each version of Java, set of JVM options and set of
jars, a background process (`build_class_archive.py`) writes the archive once. The process starts when the first command
without an archive ends.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipelines.child_process import child_environment
from pipelines.config import short_hash
from pipelines.host_cache import user_cache_folder
from vlm.files import atomic_write

DRIVER_OPTIONS = "spark.driver.extraJavaOptions"
CLASSPATH_VARIABLES = ("SPARK_HOME", "SPARK_CONF_DIR", "SPARK_DIST_CLASSPATH", "HADOOP_CONF_DIR", "YARN_CONF_DIR")
"""Environment variables from which Spark derives the classpath of its JVM."""
KEPT = 2
"""Number of archives to keep, so that a user can switch between two Python environments. An archive has about 190
MB."""
RETRY_SECONDS = 24 * 3600.0
"""Time in seconds after which `claim` allows another build of an archive whose build has failed."""


@dataclass(frozen=True)
class ClassArchive:
    """Place of the archive for one version of Java, one set of JVM options and one set of jars.

    Attributes:
        folder: cache folder of the user.
        key: hash of everything that the archive depends on.
    """

    folder: Path
    key: str

    def find(self) -> Path | None:
        """Return the path of the archive, or None if there is no archive or the size of its file has changed.

        The name of the file contains its size, because a JVM crashes with an archive that was cut off.
        """
        for path in self.folder.glob(f"{self.key}-*.jsa"):
            with suppress(OSError):
                if path.stat().st_size == int(path.stem.rpartition("-")[2]):
                    os.utime(path)  # `save` keeps the archives that were used last
                    return path
        return None

    def java_options(self) -> str:
        """Return the JVM options to append, or "" if there is no archive.

        The JVM ignores an archive that another JVM wrote or that contains the classes of other jars. With the second
        option, the JVM compares checksums and therefore also ignores a damaged archive. The comparison takes less than
        a tenth of a second.
        """
        path = self.find()
        return "" if path is None else f' "-XX:SharedArchiveFile={path}" -XX:+VerifySharedSpaces'

    def claim(self) -> bool:
        """Return whether this process shall build the archive.

        The result is False if the archive exists, or if another process got the result True in the last RETRY_SECONDS.
        """
        if self.find():
            return False
        if not self._tried_lately():
            self._mark.unlink(missing_ok=True)
        try:
            self._mark.touch(0o600, exist_ok=False)
        except FileExistsError:
            return False
        return True

    def build_later(self) -> None:
        """Start the background process that builds the archive, if there is no archive and no build was tried lately.

        The process gets the lowest priority. The process needs no terminal, so it outlives the command. Environment
        variables that may contain secrets are not passed to the process. A failure of the start is ignored, because
        every command works without the archive.
        """
        with suppress(OSError):
            if not self._tried_lately() and self.find() is None:
                subprocess.Popen(
                    [sys.executable, "-P", "-m", "pipelines.platform.build_class_archive"],
                    env=child_environment(**{k: os.environ[k] for k in CLASSPATH_VARIABLES if k in os.environ}),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )

    def save(self, built: Path) -> Path:
        """Move a complete archive into the cache folder, and keep only the KEPT archives that were used last."""
        path = self.folder / f"{self.key}-{built.stat().st_size}.jsa"
        built.chmod(0o600)
        with atomic_write(path) as temporary:
            built.replace(temporary)
        archives = sorted(self.folder.glob("*.jsa"), key=lambda each: each.stat().st_mtime, reverse=True)
        for old in [each for each in archives if each != path][KEPT - 1 :]:
            old.unlink(missing_ok=True)
            # The file `.tried` is kept, so that a user who switches between three environments does not start a build
            # of the archive with each switch.
        return path

    def _tried_lately(self) -> bool:
        """Return whether a process has tried to build the archive in the last RETRY_SECONDS."""
        with suppress(FileNotFoundError):
            return time.time() - self._mark.stat().st_mtime <= RETRY_SECONDS
        return False

    @property
    def _mark(self) -> Path:
        return self.folder / f"{self.key}.tried"


def class_archive(java: str, options: str, spark_jars: Path, jars: Sequence[str]) -> ClassArchive | None:
    """Return the place of the archive for a JVM, or None if the path of the cache folder cannot be a JVM option.

    Args:
        java: text that `java -version` prints.
        options: options of the JVM.
        spark_jars: folder of Spark's jars.
        jars: paths of further jars.
    """
    folder = user_cache_folder("jars")
    if re.search(r'[":\\]', str(folder)):
        return None
    files = [path for path in (*sorted(spark_jars.glob("*.jar")), *map(Path, jars)) if path.exists()]
    described = {
        "java": java,
        "options": options,
        "jars": [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files],
        "variables": [os.environ.get(name) for name in CLASSPATH_VARIABLES],
    }
    return ClassArchive(folder, f"classes-{short_hash(described)}")
