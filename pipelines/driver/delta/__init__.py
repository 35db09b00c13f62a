"""Delta tables and Spark, as every stage of the driver uses them.

`tables.py` creates and upgrades tables, `retry.py` retries a write that conflicts with another writer, `versions.py`
finds the version to pin, `maintain.py` compacts and vacuums. Imports pyspark and delta; never torch or MLflow.
"""
