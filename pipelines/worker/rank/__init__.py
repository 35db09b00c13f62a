"""A rank as a process: its environment, process group, failure record, log, metrics and profile.

Start reading in `env.py`, then `failure.py`. May import torch; never pyspark, MLflow or Delta.
"""
