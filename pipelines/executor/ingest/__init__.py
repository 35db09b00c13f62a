"""Ingest in Spark's Python workers: raw rows become decoded samples or refusals with a reason.

Start reading in `decode.py`; `records/` parses the rows of each kind of source, such as `records/csv.py` for CSV.
Plain functions on Arrow batches: no pyspark, torch or MLflow.
"""
