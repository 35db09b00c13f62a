"""Code that runs in the Spark driver, where each stage plans its work and commits its results.

Start reading in `run.py` of a stage, such as `ingest/run.py`. A stage may import pyspark, but must not import another
stage, torch or MLflow.
"""
