"""Delta Lake's jars for the local Spark session, which are downloaded once and then loaded from recorded paths.

Spark finds and downloads the jars with Ivy. Ivy takes two seconds to find jars that are already downloaded, and two
processes that download at the same time corrupt Ivy's cache. Therefore the paths of the jars are recorded in a file,
and only one process at a time runs Ivy.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipelines.host_cache import exclusive_lock, user_cache_folder
from vlm.files import atomic_write

logger = logging.getLogger(__name__)


def delta_artifact() -> tuple[str, str]:
    """Return the name and version of the Delta Lake jar for the installed version of Spark.

    Raises:
        PackageNotFoundError: pyspark or delta-spark is not installed.
    """
    line = ".".join(version("pyspark").split(".")[:2])
    return f"delta-spark_{line}_2.13", version("delta-spark")


@dataclass(frozen=True)
class Jars:
    """Paths at which an earlier Spark session found Delta Lake's jars.

    Attributes:
        record: file that lists the paths of the jars, one per line.
        paths: paths of all jars, or empty if a jar is missing.
    """

    record: Path
    paths: tuple[str, ...] = ()

    def load(self) -> Jars:
        """Read the recorded paths. The result has no paths if there is no record or if a recorded jar is missing."""
        paths = self.record.read_text(encoding="utf-8").split("\n") if self.record.exists() else []
        return Jars(self.record, tuple(paths) if all(Path(path).exists() for path in paths) else ())

    def settings(self) -> dict[str, str]:
        """Return Spark settings that load the recorded jars, or that download the jars if no paths are recorded."""
        if self.paths:
            return {"spark.jars": ",".join(self.paths)}
        artifact, number = delta_artifact()
        ivy = str(Path(__file__).with_name("ivysettings.xml"))
        return {"spark.jars.packages": f"io.delta:{artifact}:{number}", "spark.jars.ivySettings": ivy}

    def save(self, urls: str) -> None:
        """Record the paths at which a Spark session found the jars. `urls` is a comma-separated list."""
        if urls and not self.paths:
            paths = "\n".join(unquote(urlsplit(url).path) for url in urls.split(","))
            with atomic_write(self.record) as temporary:
                temporary.write_text(paths, encoding="utf-8")


@contextmanager
def delta_jars() -> Iterator[Jars]:
    """Yield the jars for a Spark session that starts in the block. During a download, other processes wait."""
    artifact, number = delta_artifact()
    folder = user_cache_folder("jars")
    jars = Jars(folder / f"{artifact}-{number}.txt").load()
    with ExitStack() as stack:
        if not jars.paths:
            logger.info("resolving the jars of Delta Lake; the first start downloads 90 MB")
            stack.enter_context(exclusive_lock(folder))
            if (jars := jars.load()).paths:
                stack.close()
        yield jars
