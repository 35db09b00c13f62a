"""The driver's part of an ingest, which reads a source of pictures and texts into tables `samples` and `quarantine`.

Start reading in `run.py`, which calls `sources/`, `decode.py`, `plan.py`, `commit.py` and `ledger.py` in this order.
Executors run `pipelines.executor.ingest`. This package may import pyspark and delta, but never torch or MLflow.
"""
