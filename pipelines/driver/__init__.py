"""Runs in the Spark driver: plans and commits. May import pyspark; never torch or mlflow."""
