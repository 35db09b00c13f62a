"""The pipelines: what a Spark driver plans, executors decode, torch ranks learn, and MLflow remembers."""
