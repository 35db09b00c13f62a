"""Functions for text without pictures that run in Spark's Python workers: read files, write shards and score models.

Start reading in `records.py`, which divides a file into rows. The package never imports pyspark or MLflow.
"""
