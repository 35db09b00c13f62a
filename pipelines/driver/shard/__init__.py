"""The driver's part of the shard stage, which writes rows of `samples` and `texts` to files that ranks read.

Start reading in `run.py`. This package imports pyspark, but never torch or MLflow.
"""
