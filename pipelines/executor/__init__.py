"""Code that runs in Spark's Python workers: functions on Arrow batches. The package does not import pyspark or MLflow.

Start reading in the module or folder of a pipeline stage, such as `ingest/decode.py`.
"""
