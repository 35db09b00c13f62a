"""Ingest in the driver: read a source of pictures and texts into the tables `samples` and `quarantine`.

Start reading in `run.py`, which calls `sources/`, `decode.py`, `plan.py`, `commit.py` and `ledger.py` in this order;
executors run `pipelines.executor.ingest`. May import pyspark and delta; never torch or MLflow.
"""
