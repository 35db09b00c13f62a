"""Direct access to the MLflow store of a home folder, which is an SQLite file. The package does not import MLflow."""
