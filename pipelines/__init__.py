"""Code of all stages of a run, with one package per kind of process: driver (Spark), executor (Spark's Python workers)
and worker (torch ranks).

All kinds of processes use the packages `config` (settings of a run) and `formats` (shared files and tables), but
executors and ranks use neither `platform` (differences between a laptop and a workspace) nor `tracking` (MLflow). Start
reading in `config/run.py`, then `driver/ingest/run.py`.
"""
