"""The driver's part of a caption job, which captions the rows of a Delta table that have no caption yet.

Start reading in `run.py`. The job opens its table with `source_table.py`, and merges the files that executors write
with `pending_files.py`. `drift.py` compares a finished caption job with an evaluation of the same model version. This
package imports pyspark, but never torch or MLflow.
"""
