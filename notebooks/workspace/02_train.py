# Databricks notebook source
# MAGIC %md
# MAGIC # Train on all ranks
# MAGIC
# MAGIC TorchDistributor starts the ranks: one rank per GPU on a GPU cluster, and processes on the CPU of a laptop. The
# MAGIC driver logs the metrics to MLflow and registers the model. If you run the next cells again, `run_train` reuses
# MAGIC the finished run.

# COMMAND ----------

from jobs.common import open_notebook
from notebook_settings import RUN, SMALL, WORKSPACE

job = open_notebook(RUN, WORKSPACE, SMALL)
spark = job.spark

# COMMAND ----------

from jobs.train import run_train

trained = run_train(job)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Loss by step

# COMMAND ----------

from pathlib import Path

from pipelines.formats.run_folder import RunFolder

losses = [
    (metrics.step, metrics.values["train/loss"], metrics.values.get("val/loss"))
    for metrics in RunFolder(Path(trained.run_folder)).read_metrics()
    if "train/loss" in metrics.values
]
spark.createDataFrame(losses, "step INT, training DOUBLE, validation DOUBLE").show()
