"""Modules for the process of a rank: its environment, process group, failure record, log, metrics and profiler trace.

Start reading in `env.py`, then `failure.py`. The package may import torch, but never pyspark, MLflow or Delta.
"""
