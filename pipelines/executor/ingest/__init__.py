"""Ingest in Spark's Python workers: records of files become decoded samples or refusals.

Start reading in `decode.py`. Plain functions on Arrow batches: neither pyspark nor torch.
"""
