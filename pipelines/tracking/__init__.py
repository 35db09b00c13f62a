"""MLflow tracking: runs, the model registry, and the model as an artifact.

This is the only package that imports MLflow. MLflow reads some environment variables on import, so they are set here
first, unless the environment has them already.
"""

import os

_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a training job reports to nobody but its own tracking server
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout belongs to the command: --json must stay JSON
    "MLFLOW_PRINT_MODEL_URLS_ON_CREATION": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the follower retries by itself; a person waits seconds, not minutes
}
for _name, _value in _QUIET.items():
    os.environ.setdefault(_name, _value)
