"""Digests of a model version, computed when the version is registered and compared before its files are used.

A version has two digests, because its files are used in two ways. The model files (weights, config and tokenizer) are
data, which every command reads. All other files (`MLmodel`, `model.py`, `code/`, requirements) determine the code that
MLflow executes when MLflow loads the version. In Lakesight, only the smoke test of `promote` and the model server of
`serve` execute this code.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.models_artifact_repo import REGISTERED_MODEL_META_FILE_NAME

from pipelines.errors import StageFailed
from pipelines.formats.model_copy import combine_digests
from pipelines.tracking.home_store.copied_version import DIGEST_TAG
from pipelines.tracking.logged_model import ARTIFACTS, MODEL_FILES
from vlm.files import file_digest

logger = logging.getLogger(__name__)

EXECUTED_DIGEST_TAG = "executed_digest"
"""Name of the tag that stores the digest of those files of a model version that are not model files.

A version that an earlier release registered may lack this tag or both digest tags.
"""


def digest_tags(checkpoint: Path, model_id: str) -> dict[str, str]:
    """Compute the two digests of a logged model, and return them as tags of the model version.

    The digest of the model files is computed from the checkpoint, so no weights are downloaded. The files that are not
    model files are downloaded from the artifact store, because MLflow created these files there.

    Raises:
        StageFailed: a model file of the checkpoint has been removed.
    """
    if missing := [file for file in MODEL_FILES if not (checkpoint / file).is_file()]:
        raise StageFailed(
            "a checkpoint was removed while it was registered",
            where=str(checkpoint),
            got=f"no {', no '.join(missing)}",
            fix="restore the files, then run the command again; or register another checkpoint of the run",
        )
    digest = model_digest(checkpoint)
    repository = get_artifact_repository(f"models:/{model_id}")
    with tempfile.TemporaryDirectory() as folder:
        for item in repository.list_artifacts(""):
            if item.path != ARTIFACTS:
                repository.download_artifacts(item.path, folder)  # type: ignore[no-untyped-call]
        executed = _executed_digest(Path(folder))
    return {DIGEST_TAG: digest, EXECUTED_DIGEST_TAG: executed}


def model_digest(folder: Path) -> str:
    """Return the digest of the model files in a folder. A missing model file changes the digest."""
    return combine_digests({file: file_digest(folder / file) for file in MODEL_FILES if (folder / file).is_file()})


def check_model_files(digest: str, tags: Mapping[str, str], where: str) -> None:
    """Compare the digest of downloaded model files with the digest in the tags of their version.

    Raises:
        StageFailed: the files are not the files that were registered.
    """
    _require_equal(digest, tags.get(DIGEST_TAG, digest), "files", where)


def check_all_files(folder: Path, tags: Mapping[str, str], where: str) -> None:
    """Compare all files of a downloaded version with the digests in its tags, before the files are executed.

    Raises:
        StageFailed: the files are not the files that were registered.
    """
    check_model_files(model_digest(folder / ARTIFACTS), tags, where)
    if EXECUTED_DIGEST_TAG in tags:
        _require_equal(_executed_digest(folder), tags[EXECUTED_DIGEST_TAG], "code or settings of MLflow", where)
    else:
        logger.warning(
            "%s was registered by an earlier release without a digest of the code, so the code is not checked", where
        )


def _executed_digest(folder: Path) -> str:
    return combine_digests({path.relative_to(folder).as_posix(): file_digest(path) for path in _executed(folder)})


def _executed(folder: Path) -> Iterator[Path]:
    """Yield all files of a logged model, except the model files and the files that MLflow adds to a download.

    MLflow adds a file to each downloaded folder that contains a file `MLmodel`: to the top folder and to `metadata`.
    """
    added = {folder / REGISTERED_MODEL_META_FILE_NAME, folder / "metadata" / REGISTERED_MODEL_META_FILE_NAME}
    others = {folder / ARTIFACTS / file for file in MODEL_FILES} | added
    yield from (path for path in folder.rglob("*") if path.is_file() and path not in others)


def _require_equal(digest: str, registered: str, what: str, where: str) -> None:
    if digest != registered:
        raise StageFailed(
            "the files of a model version differ from the files that were registered",
            where=where,
            got=f"{what} with digest {digest}, registered with digest {registered}",
            fix="restore the artifacts of the version, or train again to register a new version",
        )
