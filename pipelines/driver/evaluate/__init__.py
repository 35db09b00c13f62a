"""Evaluation in the driver: metrics of a model version with confidence intervals, and the promotion gate.

Start reading in `run.py`: new metrics go into `metrics.py`, the gate is `promote.py`, two versions are compared in
`compare.py`. Imports pyspark; never torch or MLflow.
"""
