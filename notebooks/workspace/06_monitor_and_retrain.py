# Databricks notebook source
# MAGIC %md
# MAGIC # Monitor captions, and train again
# MAGIC
# MAGIC If the pictures of a table change over time (drift), the captions may become worse. Signs of drift are more
# MAGIC errors and a lower log-probability of the captions. `caption` compares the statistics of each
# MAGIC captioning job with the evaluation of the same model version. If a difference exceeds its limit in the section
# MAGIC `drift` of the run config, `caption` prints a warning.

# COMMAND ----------

from jobs.common import open_notebook
from notebook_settings import RUN, SMALL, WORKSPACE

job = open_notebook(RUN, WORKSPACE, SMALL)
spark = job.spark

# COMMAND ----------

# MAGIC %md
# MAGIC ## Captions by day

# COMMAND ----------

captions = spark.table(job.platform.table("generated_captions")).where(f"model_name = '{job.model_name}'")
by_day = captions.groupBy("model_version", captions.captioned_at.cast("date").alias("day")).agg(
    {"caption": "count", "error": "count", "mean_logprob": "avg", "num_tokens": "avg"}
)
by_day.orderBy("day", "model_version").show()

# COMMAND ----------

# MAGIC %md
# MAGIC ## Train again with new pictures
# MAGIC `run_ingest` reads new files or rows of the source. With new pictures, `run_train` trains a new version, and
# MAGIC the gate compares the new version with the champion on the same pictures. Without new pictures, `run_train`
# MAGIC reuses the finished run.

# COMMAND ----------

from jobs.ingest import run_ingest
from jobs.promote import run_promote
from jobs.train import run_train

again = run_ingest(job)
trained = run_train(job)
promoted = run_promote(job, trained.model_version)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Metrics of all versions

# COMMAND ----------

evaluations = spark.table(job.platform.table("evaluations")).where(
    f"model_name = '{job.model_name}' AND slice IS NULL AND metric IN ('word_f1', 'cider', 'blind_gap')"
)
evaluations.groupBy("model_version", "shards_where").pivot("metric").avg("value").orderBy("model_version").show()
