"""Runs in torch ranks: the training loop and captioning. May import torch; never pyspark or mlflow."""
