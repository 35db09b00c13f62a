# Databricks notebook source
# MAGIC %md
# MAGIC # Train on all ranks
# MAGIC
# MAGIC On a GPU cluster, TorchDistributor starts one rank per GPU. On a laptop, the driver starts the ranks as
# MAGIC processes on the CPU. The driver logs the metrics to MLflow and registers the model. If you run the next cells
# MAGIC again, `run_train` reuses the finished run.

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
