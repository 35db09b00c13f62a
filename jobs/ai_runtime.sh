#!/usr/bin/env bash
# Command of the task `ranks` in ai_runtime.yml: start LAKESIGHT_RANKS ranks, by default one per GPU, for the run folder
# that the task `prepare` (`lakesight train --no-launch --prepared-as ai_runtime`) has written. A task of this kind has
# no parameters, so the file that names the folder has the same name for every run. The node needs Lakesight's wheel and
# torch, but neither Java nor Spark nor MLflow.
set -euo pipefail
RUNS="${LAKESIGHT_RUNS:-/Volumes/CATALOG/SCHEMA/VOLUME/runs}" # edit: `databricks bundle summary` prints the names
# Without PYTHONSAFEPATH, a folder `pipelines` in the working folder would be imported instead of the wheel.
export PYTHONSAFEPATH=1
exec torchrun --nproc-per-node "${LAKESIGHT_RANKS:-gpu}" -m pipelines.worker.main --run-dir "$(cat "$RUNS/ai_runtime.prepared")"
