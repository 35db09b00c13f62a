"""The driver's part of training: prepare a run folder, check hosts, launch ranks, and diagnose their failures.

Start reading in `run.py`, then in `pipelines.worker` for the code that runs in ranks. This package may import pyspark,
but never torch or MLflow.
"""
