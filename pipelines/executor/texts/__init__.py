"""Text without pictures in Spark's Python workers: read files of plain text, write shards, and score models.

Start reading in `records.py`, which divides a file into rows. The package never imports pyspark or MLflow.
"""
