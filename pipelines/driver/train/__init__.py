"""Training in the driver: prepare a run folder, start ranks on it, and say why they failed.

Start reading in `run.py`; what ranks do is `pipelines.worker`. May import pyspark; never torch or MLflow.
"""
