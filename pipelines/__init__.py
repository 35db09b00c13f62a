"""Stages of a run, one package per process: driver (Spark), executor (Spark's Python workers), worker (torch ranks).

`platform` knows where a run happens, `config` describes it, `formats` are the files and tables that processes share,
`tracking` talks to MLflow. Start reading in `config/run.py`, then `driver/ingest/run.py`.
"""
