"""Modules that make the name, the description, the datasets and the figures of a run in MLflow.

Start reading in `training.py`, which uses the other modules of this package to describe a training run.
"""
