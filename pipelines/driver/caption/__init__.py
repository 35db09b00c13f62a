"""The driver's part of a caption job, which captions the rows of a Delta table that have no caption yet.

Start reading in `run.py`. `source_table.py` opens the table, `pending_files.py` merges the files that executors write,
and `drift.py` compares the job with the evaluation of the model. This package imports pyspark, but never torch or
MLflow.
"""
