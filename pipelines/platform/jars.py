"""Delta Lake's jars for a laptop's Spark: fetched once, and from then on taken from where they were found.

Spark fetches them by Ivy, which takes two seconds to find out that all of them are there, and whose cache is spoilt by
two processes that fill it at once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipelines.host_cache import alone, own_folder
from vlm.files import atomic_write

logger = logging.getLogger(__name__)


def delta_artifact() -> tuple[str, str]:
    """Name and version of the Delta Lake jar for the Spark that is installed.

    Raises:
        PackageNotFoundError: pyspark or delta-spark is not installed.
    """
    line = ".".join(version("pyspark").split(".")[:2])
    return f"delta-spark_{line}_2.13", version("delta-spark")


@dataclass(frozen=True)
class Jars:
    """Delta Lake's jars, as they were found when Spark last looked for them.

    Attributes:
        noted: a file with their paths.
        paths: those, where all of them are there.
    """

    noted: Path
    paths: tuple[str, ...] = ()

    def read(self) -> Jars:
        """With the paths that are noted, if there are some, and all of them are there."""
        paths = self.noted.read_text(encoding="utf-8").split("\n") if self.noted.exists() else []
        return Jars(self.noted, tuple(paths) if all(Path(path).exists() for path in paths) else ())

    def settings(self) -> dict[str, str]:
        """By which Spark takes them from where they are, or fetches them; to look for them takes it two seconds."""
        if self.paths:
            return {"spark.jars": ",".join(self.paths)}
        artifact, number = delta_artifact()
        ivy = str(Path(__file__).with_name("ivysettings.xml"))
        return {"spark.jars.packages": f"io.delta:{artifact}:{number}", "spark.jars.ivySettings": ivy}

    def note(self, found: str) -> None:
        """Write down where they were found: URLs, with commas between them."""
        if found and not self.paths:
            with atomic_write(self.noted) as temporary:
                temporary.write_text(
                    "\n".join(unquote(urlsplit(url).path) for url in found.split(",")), encoding="utf-8"
                )


@contextmanager
def delta_jars() -> Iterator[Jars]:
    """One process at a time fetches jars, while others wait: together they would spoil Ivy's cache."""
    artifact, number = delta_artifact()
    folder = own_folder("jars")
    jars = Jars(folder / f"{artifact}-{number}.txt").read()
    with ExitStack() as stack:
        if not jars.paths:
            logger.info("Delta Lake is fetched, or looked for: 90 MB, once")
            stack.enter_context(alone(folder))
            if (jars := jars.read()).paths:
                stack.close()
        yield jars
