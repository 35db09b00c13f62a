"""Talks to MLflow: runs, the registry, the model as an artifact. The only room that imports mlflow."""
