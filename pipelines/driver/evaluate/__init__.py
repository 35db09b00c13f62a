"""Evaluation in the driver: scores of a model version, metrics with intervals, comparison and the promotion gate.

Start reading in `run.py`. May import pyspark; never torch or MLflow.
"""
