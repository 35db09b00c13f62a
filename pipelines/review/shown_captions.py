"""SELECT statement for the captions that reviewers judge.

The statement runs in the warehouse of a workspace and on local files, so it uses only SQL that Spark and DataFusion
both understand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipelines.formats.delta_files import quoted_text
from pipelines.formats.tables import DECISIONS, GENERATED_CAPTIONS, VERDICTS
from pipelines.review.verdicts import CAPTION_COLUMNS, KEY

CHAMPION, ALL = "champion", "all"
TABLES = (GENERATED_CAPTIONS.name, VERDICTS.name, DECISIONS.name)
"""Tables from which the statement reads."""
_SELECT = """
WITH seen AS (
  SELECT *,
    FIRST_VALUE(sha256) OVER (
      PARTITION BY id_column, image_column, image_id
      ORDER BY CASE WHEN sha256 IS NULL THEN 1 ELSE 0 END, COALESCE(read_at, captioned_at) DESC, sha256
    ) AS newest_sha256
  FROM (SELECT {read} FROM {generated_captions} WHERE source_table = {table}) AS captioned
),
champion AS (
  {champion}
),
judgements AS (
  SELECT {judged}, verdict, CASE WHEN verdict = 'corrected' THEN text END AS correction
  FROM {verdicts} WHERE source_table = {table} AND model_name = {model}
),
ranked AS (
  SELECT {columns}, judgements.verdict, judgements.correction,
    ROW_NUMBER() OVER (
      PARTITION BY seen.id_column, seen.image_column, seen.image_id, seen.prompt, seen.model_version, seen.model_digest
      ORDER BY CASE WHEN judgements.verdict = 'bad' THEN 1 ELSE 0 END, seen.captioned_at DESC, seen.settings_hash
    ) AS age
  FROM seen CROSS JOIN champion
  LEFT JOIN judgements ON {same_caption}
  WHERE seen.model_name = {model} AND seen.caption IS NOT NULL AND seen.sha256 = seen.newest_sha256 AND {of_version}
)
SELECT {names}, verdict, correction FROM ranked WHERE age = 1 OR verdict IS NOT NULL
"""
"""- `seen`: `newest_sha256` is the SHA-256 of the picture that the most recent job has read, whatever model it used.
  Captions of earlier pictures are left out, because nobody can judge a caption without its picture.
- `champion`: one row, whose values are null if no version of the model was promoted.
- `ranked`: if a picture has several captions with different decoding settings, the newest caption that was not judged
  as bad has the age 1. The view `champion_captions` shows this caption.
"""

_RECORDED_CHAMPION = """
SELECT MAX(model_version) AS champion_version, MAX(model_digest) AS champion_digest FROM (
    SELECT model_version, model_digest, ROW_NUMBER() OVER (ORDER BY decided_at DESC, decision_id) AS age
    FROM {decisions} WHERE model_name = {model} AND action IN ('promote', 'rollback')
  ) AS changes WHERE age = 1
"""


class Selection(NamedTuple):
    """Values in the conditions of the statement. Each value is SQL: a quoted literal, or a marker such as `:table`.

    Attributes:
        table: full name of the captioned table.
        model: full name of the model.
        version: number of the version.
    """

    table: str
    model: str
    version: str


def select(
    names: Mapping[str, str],
    values: Selection,
    which: str,
    missing: Sequence[str] = (),
    champion: tuple[str, str | None] | None = None,
) -> str:
    """Return a statement that selects CAPTION_COLUMNS, `verdict` and `correction` (the text of a corrected caption).

    Args:
        names: full name of each table in TABLES, by name of the table.
        values: values of the conditions.
        which: `champion`, `all` or another text. `champion` selects the captions of the champion, or of all versions if
            there is no champion. `all` selects the captions of all versions. Another text selects the captions of
            `values.version`.
        missing: columns that tables of Lakesight 0.1.0 lack, as `table.column`. These columns are read as null.
        champion: number and digest of the champion, or None to take the champion in table `decisions`. The digest is
            None if it is unknown. The digest of a caption's version is then not compared.
    """
    of_version = {
        CHAMPION: "(champion_version IS NULL OR seen.model_version = champion_version "
        "AND COALESCE(seen.model_digest = champion_digest, TRUE))",
        ALL: "TRUE",
    }.get(which, f"seen.model_version = {values.version}")
    read = dict.fromkeys((*CAPTION_COLUMNS, "model_name", "captioned_at", "read_at"))
    digest = "COALESCE(judgements.model_digest, '') = COALESCE(seen.model_digest, '')"
    same = [f"judgements.{name} = seen.{name}" for name in KEY if name != "model_digest"]
    found = _RECORDED_CHAMPION.format(**names, model=values.model).strip()
    if champion is not None:
        version, known = quoted_text(champion[0]), quoted_text(champion[1]) if champion[1] else "CAST(NULL AS VARCHAR)"
        found = f"SELECT {version} AS champion_version, {known} AS champion_digest"
    return _SELECT.format(
        **names,
        champion=found,
        table=values.table,
        model=values.model,
        of_version=of_version,
        read=_columns(GENERATED_CAPTIONS.name, list(read), missing),
        judged=_columns(VERDICTS.name, KEY, missing),
        columns=", ".join(f"seen.{name}" for name in CAPTION_COLUMNS),
        names=", ".join(CAPTION_COLUMNS),
        same_caption=" AND ".join([*same, digest]),
    ).strip()


def _columns(table: str, names: Sequence[str], missing: Sequence[str]) -> str:
    kinds = {"read_at": "TIMESTAMP"}
    absent = {name for name in names if f"{table}.{name}" in missing}
    return ", ".join(
        f"CAST(NULL AS {kinds.get(name, 'VARCHAR')}) AS {name}" if name in absent else name for name in names
    )
