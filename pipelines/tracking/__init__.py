"""Talks to MLflow: runs, the registry, the model as an artifact. The only room that imports mlflow.

MLflow reads some switches while it is imported, so they are set here, before any module of this room imports it. A
value that the environment already has stays.
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
