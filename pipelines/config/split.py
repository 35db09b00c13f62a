"""The section `data.split` of a run: how the rows of a source are divided into training, validation and test rows."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vlm.config import Config, Probability

Split = Literal["train", "val", "test"]


class HashSplitConfig(Config):
    """Split by the SHA-256 of the picture or plain text. Equal pictures get the same split in every ingest.

    With `near_duplicates`, a new picture gets the split of nearly equal pictures instead. `lakesight ingest --refresh`
    assigns the splits of all pictures again.

    Attributes:
        val: share of the pictures that are put into the split `val` (validation).
        test: share of the pictures that are put into the split `test`.
    """

    kind: Literal["hash"] = "hash"
    val: Probability = 0.05
    test: Probability = 0.05

    @model_validator(mode="after")
    def _something_to_train_on(self) -> Self:
        if self.val + self.test >= 1:
            raise ValueError("val + test is 1 or more, so no rows are left to train on: keep val + test below 1")
        return self


class FileSplitConfig(Config):
    """Split given by the names of the source's files or of their folders, such as train.csv or val/1.csv."""

    kind: Literal["file"]


class ColumnSplitConfig(Config):
    """Split given by a column with the values train, val (or validation, valid, dev) and test (or eval).

    The column may also have the values training, testing and evaluation, in upper or lower case.

    Attributes:
        column: name of the column that holds the split.
    """

    kind: Literal["column"]
    column: str = "split"


SplitConfig = Annotated[HashSplitConfig | FileSplitConfig | ColumnSplitConfig, Field(discriminator="kind")]
