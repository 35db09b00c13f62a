"""Ingest in the driver: a source of pictures and texts into `samples` and `quarantine`.

Start reading in `run.py`. The order is `sources/`, `decode.py`, `plan.py`, `commit.py`, `ledger.py`; the half that
executors run is `pipelines.executor.ingest`. May import pyspark; never torch or MLflow.
"""
