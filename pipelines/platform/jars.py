"""Delta Lake's jars for the local Spark session: downloaded once, then loaded from where they were found.

Spark resolves them with Ivy. Ivy takes two seconds to find jars that are already there, and two processes that download
at the same time corrupt its cache. So the paths of the jars are saved, and only one process at a time runs Ivy.
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
    """Return name and version of the Delta Lake jar for the installed Spark.

    Raises:
        PackageNotFoundError: pyspark or delta-spark is not installed.
    """
    line = ".".join(version("pyspark").split(".")[:2])
    return f"delta-spark_{line}_2.13", version("delta-spark")


@dataclass(frozen=True)
class Jars:
    """Paths of Delta Lake's jars, as an earlier session found them.

    Attributes:
        record: file that lists the paths, one per line.
        paths: paths of all jars; empty if one of them is missing.
    """

    record: Path
    paths: tuple[str, ...] = ()

    def load(self) -> Jars:
        """Read the recorded paths. The result has none if there is no record, or if a recorded jar is missing."""
        paths = self.record.read_text(encoding="utf-8").split("\n") if self.record.exists() else []
        return Jars(self.record, tuple(paths) if all(Path(path).exists() for path in paths) else ())

    def settings(self) -> dict[str, str]:
        """Return Spark settings that load the recorded jars, or that download them where there is no record."""
        if self.paths:
            return {"spark.jars": ",".join(self.paths)}
        artifact, number = delta_artifact()
        ivy = str(Path(__file__).with_name("ivysettings.xml"))
        return {"spark.jars.packages": f"io.delta:{artifact}:{number}", "spark.jars.ivySettings": ivy}

    def save(self, urls: str) -> None:
        """Record where a session found the jars. `urls` are comma-separated."""
        if urls and not self.paths:
            paths = "\n".join(unquote(urlsplit(url).path) for url in urls.split(","))
            with atomic_write(self.record) as temporary:
                temporary.write_text(paths, encoding="utf-8")


@contextmanager
def delta_jars() -> Iterator[Jars]:
    """Yield the jars for a session that starts in the block. While jars are downloaded, other processes wait."""
    artifact, number = delta_artifact()
    folder = user_cache_folder("jars")
    jars = Jars(folder / f"{artifact}-{number}.txt").load()
    with ExitStack() as stack:
        if not jars.paths:
            logger.info("resolving Delta Lake's jars; the first time downloads 90 MB")
            stack.enter_context(exclusive_lock(folder))
            if (jars := jars.load()).paths:
                stack.close()
        yield jars
