"""Training in the driver: prepare a run folder, check hosts, launch ranks, and diagnose their failures.

Start reading in `run.py`. The code that runs in ranks is `pipelines.worker`. This package may import pyspark, but never
torch or MLflow.
"""
