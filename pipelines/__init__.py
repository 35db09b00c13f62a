"""Stages of a run, one package per process: driver (Spark), executor (Spark's Python workers), worker (torch ranks).

The package `config` describes a run, `platform` describes where the run happens, `formats` defines files and tables
that processes share, and `tracking` talks to MLflow. Start reading in `config/run.py`, then `driver/ingest/run.py`.
"""
