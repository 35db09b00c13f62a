"""Captioning in the driver: captions for rows of a Delta table that a model version has not captioned yet.

Start reading in `run.py`: `source_table.py` opens the table, `pending_files.py` merges the files that executors write,
`drift.py` compares with the evaluation. Imports pyspark; never torch or MLflow.
"""
