"""Code that runs in the Spark driver: each stage plans and commits here.

Start reading in `run.py` of a stage, such as `ingest/run.py`; stages do not import each other. May import pyspark;
never torch or MLflow.
"""
