"""The driver's part of an evaluation: metrics of a model version with confidence intervals, and the promotion gate.

Start reading in `run.py`. New metrics go into `metrics.py`, `gate.py` is the promotion gate, and `compare.py` compares
two model versions. This package imports pyspark, but never torch or MLflow.
"""
