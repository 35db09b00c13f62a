"""Code that runs in the Spark driver, where each stage plans its work and commits its results.

Start reading in `run.py` of a stage, such as `ingest/run.py`. Stages do not import each other. This package may import
pyspark, but never torch or MLflow.
"""
