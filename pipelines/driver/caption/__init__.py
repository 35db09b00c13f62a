"""The driver's part of a caption job, which captions the rows of a Delta table that have no caption yet.

Start reading in `run.py`, which uses `source_table.py` to open the table and `pending_files.py` to merge the files that
executors write; `drift.py` compares the finished job with an evaluation. This package imports pyspark, but never torch
or MLflow.
"""
