"""MLflow tracking: runs, the model registry, and the registered model. Only this package imports mlflow.

MLflow reads some environment variables when mlflow is imported, so this file sets defaults for these variables first.
"""

import os

_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # MLflow must not report usage to third parties
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # with --json, stdout must be valid JSON
    "MLFLOW_PRINT_MODEL_URLS_ON_CREATION": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # `Follower` has its own retries, and users should not wait for minutes
}
for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)
