"""The driver's part of a caption job, which captions the rows of a Delta table that have no caption yet.

Start reading in `run.py`, then in `drift.py`, which compares a finished job with an evaluation of the same model
version. This package imports pyspark, but never torch or MLflow.
"""
