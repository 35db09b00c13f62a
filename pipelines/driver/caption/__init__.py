"""Captioning in the driver: rows of a Delta table that a model version has not captioned yet.

Start reading in `run.py`; the half that executors run is `pipelines.executor.caption`. May import pyspark; never torch
or MLflow.
"""
