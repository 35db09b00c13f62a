# Databricks notebook source
# MAGIC %md
# MAGIC # Promote a version, and roll back
# MAGIC
# MAGIC The gate checks the newest version. A version that passes all checks becomes the champion, which `caption` and
# MAGIC the serving endpoint use. The table `decisions` records every promotion, refusal and rollback.

# COMMAND ----------

from jobs.common import open_notebook
from notebook_settings import RUN, SMALL, WORKSPACE

job = open_notebook(RUN, WORKSPACE, SMALL)
spark = job.spark

# COMMAND ----------

from jobs.promote import run_promote

promoted = run_promote(job, "latest")

# COMMAND ----------

# MAGIC %md
# MAGIC ## Roll back
# MAGIC Set `ROLL_BACK` to `True` to make the previous champion the champion again. A second rollback undoes the first
# MAGIC rollback.

# COMMAND ----------

from jobs.rollback import run_rollback

ROLL_BACK = False
if ROLL_BACK:
    print(f"version {run_rollback(job)} is the champion again")

# COMMAND ----------

# MAGIC %md
# MAGIC ## Decisions

# COMMAND ----------

decisions = spark.table(job.platform.table("decisions")).where(f"model_name = '{job.model_name}'")
decisions = decisions.select("decided_at", "action", "model_version", "champion", "decided_by", "reasons")
decisions.orderBy("decided_at").show(truncate=60)
