"""Direct access to the SQLite file of the MLflow store in a home folder. The package does not import MLflow."""
