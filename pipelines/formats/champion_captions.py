"""The view `champion_captions`, which shows users the champion's newest good caption of each picture.

Spark creates the view in a catalog. On a laptop, `lakesight show champion_captions` runs the same SELECT statement on
the files of the tables, without Spark. The SELECT statement therefore uses only SQL that Spark and DataFusion both
understand.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.formats.delta_files import quoted_text
from pipelines.formats.tables import DECISIONS, GENERATED_CAPTIONS, VERDICTS

NAME = "champion_captions"
COMMENT = "Newest caption by the champion for each picture, prompt and model. Captions judged as bad are left out"
COLUMNS = {
    "source_table": "Table that was captioned, which contains the picture",
    "image_id": "Id of the picture in source_table",
    "caption": "Caption by the champion, or the correction that a person has written",
    "prompt": "Question about the picture; empty for a plain caption",
    "model_name": "Name of the registered model",
    "model_version": "Version that is the champion of the model",
    "mean_logprob": "Mean log-probability of the generated tokens",
    "verdict": "Verdict of a reviewer: good or corrected; null if nobody has reviewed the caption",
    "sha256": "SHA-256 of the captioned picture",
    "captioned_at": "Time of captioning",
    "id_column": "Column of source_table with the ids",
    "image_column": "Column of source_table with the pictures",
    "image_root": "Folder or URL of the pictures if image_column holds paths or URLs; null otherwise",
}
"""Comment of each column of the view, by column name.

The view has at most one row for each combination of source table, id column, picture column, id, model and prompt.
"""
TABLES = (GENERATED_CAPTIONS.name, DECISIONS.name, VERDICTS.name)
"""Tables from which the view `champion_captions` reads."""

_SELECT = """
WITH named AS (
  SELECT *,
    COALESCE(id_column, MAX(id_column) OVER (PARTITION BY source_table, image_id, sha256)) AS from_ids,
    COALESCE(image_column, MAX(image_column) OVER (PARTITION BY source_table, image_id, sha256)) AS from_column,
    MAX(image_column) OVER (PARTITION BY source_table, image_id) AS any_column
  FROM {generated_captions}
),
seen AS (
  SELECT *,
    FIRST_VALUE(sha256) OVER (
      PARTITION BY source_table, from_ids, from_column, image_id
      ORDER BY CASE WHEN sha256 IS NULL THEN 1 ELSE 0 END, COALESCE(read_at, captioned_at) DESC, sha256
    ) AS newest_sha256
  FROM named WHERE from_column IS NOT NULL OR any_column IS NULL
)
SELECT {columns} FROM (
  SELECT
    captions.source_table, captions.image_id, COALESCE(verdicts.text, captions.caption) AS caption, captions.prompt,
    captions.model_name, captions.model_version, captions.mean_logprob, verdicts.verdict, captions.sha256,
    captions.captioned_at, captions.from_ids AS id_column, captions.from_column AS image_column, captions.image_root,
    ROW_NUMBER() OVER (
      PARTITION BY captions.source_table, captions.from_ids, captions.from_column, captions.image_id,
        captions.model_name, captions.prompt
      ORDER BY captions.captioned_at DESC, captions.settings_hash
    ) AS age
  FROM seen AS captions
  JOIN (
    SELECT model_name, model_version, model_digest,
      ROW_NUMBER() OVER (PARTITION BY model_name ORDER BY decided_at DESC, decision_id) AS age
    FROM {decisions} WHERE action IN ('promote', 'rollback'){known}{others}
  ) AS champions
    ON champions.age = 1 AND captions.model_name = champions.model_name
    AND captions.model_version = champions.model_version
    AND COALESCE(captions.model_digest = champions.model_digest, TRUE)
  LEFT JOIN {verdicts} AS verdicts
    ON verdicts.source_table = captions.source_table AND verdicts.image_id = captions.image_id
    AND verdicts.sha256 = captions.sha256
    AND verdicts.model_name = captions.model_name AND verdicts.model_version = captions.model_version
    AND verdicts.settings_hash = captions.settings_hash
    AND COALESCE(verdicts.model_digest, '') = COALESCE(captions.model_digest, '')
  WHERE captions.caption IS NOT NULL AND captions.sha256 = captions.newest_sha256
    AND COALESCE(verdicts.verdict, 'good') <> 'bad'
) AS good WHERE age = 1
"""
"""SELECT statement of the view.

- `named`: rows that Lakesight 0.1.0 wrote contain no column names. These rows get the column names from another row
  with the same picture, if there is such a row.
- `seen`: `newest_sha256` is the SHA-256 of the picture that the most recent job has read, whatever model the job used.
  Captions of earlier pictures are left out, because the caption of an earlier picture is wrong for the present picture.
  A row that Lakesight 0.1.0 wrote is also left out if no row with the same picture contains column names, but another
  row with the same id contains column names.
"""


def select(prefix: str = "", champions: Mapping[str, tuple[str, str | None]] | None = None) -> str:
    """Return the SELECT statement of the view.

    Args:
        prefix: text before the names of the tables, such as `schema.`.
        champions: version and digest of each champion that the registry knows, by name of the model. For these models,
            the table `decisions` is ignored. The digest is None if it is unknown. If a champion has no digest, captions
            of its version are selected whatever their own digest is.
    """
    registered = ", ".join(map(quoted_text, champions or {}))
    known = f"\n      AND model_name NOT IN ({registered})" if registered else ""
    others = "".join(
        f"\n    UNION ALL SELECT {quoted_text(name)}, {quoted_text(version)}, "
        f"{quoted_text(digest) if digest else 'CAST(NULL AS VARCHAR)'}, 1"
        for name, (version, digest) in (champions or {}).items()
    )
    names = {name: f"{prefix}{name}" for name in TABLES}
    return _SELECT.format(columns=", ".join(COLUMNS), known=known, others=others, **names).strip()
