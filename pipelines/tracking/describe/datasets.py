"""Datasets that MLflow shows as inputs of a run. Each dataset is a Delta table with version, schema and profile."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pyarrow as pa
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import AnyType, Array, Object, Property

from pipelines.config import short_hash
from pipelines.formats.shards import Manifest, shard_schema

CONTEXT = "mlflow.data.context"
TYPES = (
    (pa.types.is_boolean, DataType.boolean),
    (pa.types.is_int64, DataType.long),
    (pa.types.is_integer, DataType.integer),
    (pa.types.is_float64, DataType.double),
    (pa.types.is_floating, DataType.float),
    (pa.types.is_string, DataType.string),
    (pa.types.is_large_string, DataType.string),
    (pa.types.is_binary, DataType.binary),
    (pa.types.is_large_binary, DataType.binary),
    (pa.types.is_fixed_size_binary, DataType.binary),
    (pa.types.is_temporal, DataType.datetime),
)
"""Pairs of a function and an MLflow type. Arrow types that the function recognises are converted to the MLflow type."""


def shard_input(manifest: Manifest, context: str) -> DatasetInput:
    """Return the dataset of the rows in shards: table, table version, columns that ranks read, and number of rows.

    Args:
        manifest: manifest of the shard folder.
        context: what the rows are used for, such as 'training'. MLflow shows the context beside the dataset.
    """
    request = manifest.request
    profile = {"num_rows": manifest.num_rows, "source": request.source, "split": request.split}
    if request.where:
        profile["where"] = request.where
    if manifest.parts:
        profile["rows_by_source"] = {part.source: part.rows for part in manifest.parts}
    version = (request.table, request.table_version)
    return table_input(version, manifest.content_hash, shard_schema(request), profile, context)


def table_input(
    version: tuple[str, int], digest: str, schema: pa.Schema, profile: Mapping[str, object], context: str
) -> DatasetInput:
    """Return the dataset of some rows of a Delta table.

    Args:
        version: name and version number of the table.
        digest: hash that identifies the rows.
        schema: names and types of the columns of the rows.
        profile: number of rows, and the conditions by which the rows were selected.
        context: what the rows are used for, such as 'training'. MLflow shows the context beside the dataset.
    """
    name, number = version
    dataset = Dataset(
        name,
        digest,
        "delta_table",
        json.dumps({"delta_table_name": name, "delta_table_version": number}),
        schema=json.dumps({"mlflow_colspec": _columns(schema).to_dict()}),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag(CONTEXT, context)])


def captioned_input(version: tuple[str, int], schema: pa.Schema, profile: Mapping[str, object]) -> DatasetInput:
    """Return the dataset of a table whose pictures were captioned."""
    return table_input(version, short_hash(*version, profile), schema, profile, "captioning")


def _columns(schema: pa.Schema) -> Schema:
    return Schema([ColSpec(_type(field.type), field.name) for field in schema])


def _type(kind: pa.DataType) -> DataType | Array | Object | AnyType:
    """Return MLflow's type for an Arrow type, or AnyType for an Arrow type that MLflow lacks, such as a map."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return Array(_type(kind.value_type))
    if pa.types.is_struct(kind) and kind.num_fields:
        return Object([Property(field.name, _type(field.type)) for field in kind])
    return next((found for recognises, found in TYPES if recognises(kind)), AnyType())  # type: ignore[no-untyped-call]
