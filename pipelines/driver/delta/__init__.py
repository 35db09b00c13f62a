"""Functions for Delta tables and Spark that every stage of the driver uses.

`tables.py` creates and upgrades tables, `retry.py` retries a write that conflicts with another writer, `versions.py`
finds the table version to pin, and `maintain.py` compacts and vacuums tables. This package imports pyspark and delta,
but never torch or MLflow.
"""
