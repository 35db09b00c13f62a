"""Runs in Spark's Python workers: plain functions on Arrow batches. Imports neither pyspark nor torch."""
