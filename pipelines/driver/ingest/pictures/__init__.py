"""Ingest of pictures with texts, which reads rows into table `samples` and refused rows into `quarantine`.

Start reading in `write.py`. This package may import pyspark and delta, but never torch or MLflow.
"""
