"""Code that runs in Spark's Python workers: functions on Arrow batches. No pyspark, torch or MLflow.

Start reading in the module or folder of a stage, such as `ingest/decode.py`.
"""
