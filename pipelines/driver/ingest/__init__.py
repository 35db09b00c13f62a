"""The driver's part of an ingest, which reads a source of pictures and texts into tables `samples` and `quarantine`.

Start reading in `run.py`, which calls `sources/`, `decode.py` (on executors, with `pipelines.executor.ingest`),
`plan.py`, `commit.py` and `ledger.py` in this order. This package may import pyspark and delta, but never torch or
MLflow.
"""
