"""The process of a rank: environment, process group, failure record, log, metrics and profile.

Start reading in `env.py`, then `failure.py`. The package may import torch, but never pyspark, MLflow or Delta.
"""
