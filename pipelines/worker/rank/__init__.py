"""A rank as a process: its environment, its group, its log, and how it fails.

Start reading in `env.py`. May import torch; never pyspark, MLflow or Delta.
"""
