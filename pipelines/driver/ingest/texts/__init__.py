"""Ingest of text without pictures, which reads files into table `texts` and refused rows into `quarantine`.

Start reading in `write.py`. This package may import pyspark and delta, but never torch or MLflow.
"""
