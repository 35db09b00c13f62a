"""The driver's part of an evaluation: metrics of a model version with confidence intervals, and the promotion gate.

Start reading in `run.py`, then in `metrics.py` to add a metric, in `gate.py` for the promotion gate, or in `compare.py`
for a comparison of two model versions. This package imports pyspark, but never torch or MLflow.
"""
