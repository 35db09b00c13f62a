"""What people see of a run in MLflow: its name, its description, its datasets and its figures.

Start reading in `training.py`, which describes a training run with the other modules of the package.
"""
