"""Formats that processes share: columns of tables, training shards, the run folder, and statistics of captions.

Start reading in `tables.py`, then `run_folder.py`, which describes the files of a training run. Of the project's
packages, `formats` imports only `pipelines.config` and `vlm`, and never torch, Spark or MLflow.
"""
