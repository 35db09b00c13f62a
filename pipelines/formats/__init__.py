"""What is stored, and how: columns of tables, training shards, the run folder, counts of captions.

The packages meet in these formats and nowhere else. Start reading in `tables.py`; `run_folder.py` is how a training run
travels. Imports `pipelines.config` and `vlm` alone: no torch, Spark or MLflow.
"""
