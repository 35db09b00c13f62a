"""Code of all stages of a run, with one package per kind of process: driver (Spark), executor (Spark's Python workers)
and worker (torch ranks).

The package `config` defines the settings of a run, `platform` covers the differences between a laptop and a workspace,
`formats` defines files and tables that processes share, and `tracking` talks to MLflow. Start reading in
`config/run.py`, then `driver/ingest/run.py`.
"""
