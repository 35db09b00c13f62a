"""Code that runs in the Spark driver: each stage plans and commits here. May import pyspark; never torch or MLflow.

Start reading in `run.py` of a stage, such as `ingest/run.py`. Stages do not import each other.
"""
