# Databricks notebook source
# MAGIC %md
# MAGIC # Evaluate the model, also by slice
# MAGIC
# MAGIC The newest version of the model captions pictures that were not used for training. Each metric has a 95 %
# MAGIC confidence interval. The caption of the most similar training picture and the best constant caption are
# MAGIC baselines.

# COMMAND ----------

from jobs.common import open_notebook
from notebook_settings import RUN, SMALL, WORKSPACE

job = open_notebook(RUN, WORKSPACE, SMALL)
spark = job.spark

# COMMAND ----------

from jobs.evaluate import run_evaluate

evaluated = run_evaluate(job, "latest")

# COMMAND ----------

# MAGIC %md
# MAGIC ## Slices with the lowest score
# MAGIC A slice is a part of the pictures, such as pictures with long texts. The confidence interval of a small slice
# MAGIC is wide.

# COMMAND ----------

slices = spark.table(job.platform.table("evaluations")).where(
    f"model_name = '{evaluated.model_name}' AND model_version = '{evaluated.model_version}' "
    "AND metric = 'word_f1' AND slice IS NOT NULL"
)
slices.select("dataset_version", "shards_where", "slice", "n", "value", "low", "high").orderBy("value").show(truncate=False)
