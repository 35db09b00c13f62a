# Databricks notebook source
# MAGIC %md
# MAGIC # Ingest pictures, and look at the rows
# MAGIC
# MAGIC Executors decode the pictures. Good rows go to the table `samples`. Refused rows go to the table `quarantine`
# MAGIC with their whole content and a reason. If you run the next cells again, the ingest adds no row.

# COMMAND ----------

from jobs.common import open_notebook
from notebook_settings import RUN, SMALL, WORKSPACE

job = open_notebook(RUN, WORKSPACE, SMALL)
spark = job.spark

# COMMAND ----------

from jobs.ingest import run_ingest

ingested = run_ingest(job)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Samples by split

# COMMAND ----------

samples = spark.table(job.platform.table("samples")).where(f"source = '{job.source}'")
samples.groupBy("split").count().orderBy("split").show()
samples.selectExpr("image_id", "split", "width", "height", "texts[0].text AS text").show(5, truncate=60)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Refused rows by reason

# COMMAND ----------

refused = spark.table(job.platform.table("quarantine")).where(f"source = '{job.source}'")
refused.groupBy("reason").count().orderBy("reason").show()
