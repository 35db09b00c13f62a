"""Training in the driver: prepare a run folder, check hosts, launch ranks, and diagnose their failures.

Start reading in `run.py`; the code that runs in ranks is `pipelines.worker`. May import pyspark; never torch or MLflow.
"""
