#!/usr/bin/env bash
# The task `ranks` in ai_runtime.yml runs this script. The script starts LAKESIGHT_RANKS ranks, by default one per GPU.
# The ranks train in the run folder that the task `prepare` (`lakesight train --no-launch --prepared-as ai_runtime`) has
# written. The task `ranks` cannot have parameters. Therefore the file with the path of the run folder has the same name
# for every run. The node needs Lakesight's wheel and torch, but neither Java nor Spark nor MLflow.
set -euo pipefail
RUNS="${LAKESIGHT_RUNS:-/Volumes/CATALOG/SCHEMA/VOLUME/runs}" # edit: `databricks bundle summary` prints the names
# Without PYTHONSAFEPATH, a folder `pipelines` in the working folder would be imported instead of the wheel.
export PYTHONSAFEPATH=1
exec torchrun --nproc-per-node "${LAKESIGHT_RANKS:-gpu}" -m pipelines.worker.main --run-dir "$(cat "$RUNS/ai_runtime.prepared")"
