"""Functions of ingest that Spark's Python workers run to turn raw rows into decoded samples or refusals with a reason.

Start reading in `decode.py`; the folder `records/` has one parser for each kind of source, such as `records/csv.py`.
The modules contain plain functions on Arrow batches and do not import pyspark, torch or MLflow.
"""
