"""Formats that processes share: columns of tables, training shards, the run folder, statistics of captions.

Start reading in `tables.py`; `run_folder.py` describes the files of a training run. Imports `pipelines.config` and
`vlm` only: no torch, Spark or MLflow.
"""
