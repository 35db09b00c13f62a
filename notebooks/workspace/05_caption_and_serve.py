# Databricks notebook source
# MAGIC %md
# MAGIC # Caption a table, and serve the champion
# MAGIC
# MAGIC A Spark job captions the rows of the evaluation split that the champion has not captioned yet. Each caption is
# MAGIC stored with its model version, its table version and its settings.

# COMMAND ----------

from jobs.common import open_notebook
from notebook_settings import RUN, SMALL, WORKSPACE

job = open_notebook(RUN, WORKSPACE, SMALL)
spark = job.spark

# COMMAND ----------

from jobs.caption import run_caption
from jobs.pipeline import held_out

captioned = run_caption(job, "champion", where=held_out(job))

# COMMAND ----------

# MAGIC %md
# MAGIC ## Serve
# MAGIC In a workspace, set `SERVE` to `True` to create or update a serving endpoint. Without requests, the endpoint
# MAGIC scales down to zero instances. The page `docs/databricks.md` shows the SQL query that calls the endpoint.

# COMMAND ----------

from jobs.endpoint import run_endpoint

SERVE = False
if SERVE:
    print(run_endpoint(job, None))

# COMMAND ----------

# MAGIC %md
# MAGIC ## Human texts and generated captions
# MAGIC After 40 steps of training, the captions do not describe the pictures yet.

# COMMAND ----------

captions = spark.table(job.platform.table("generated_captions")).where(
    f"source_table = '{captioned.source_table}' AND model_name = '{captioned.model_name}' "
    f"AND model_version = '{captioned.model_version}' AND settings_hash = '{captioned.settings_hash}'"
)
samples = spark.table(job.platform.table("samples"))
both = captions.join(samples, ["image_id", "sha256"])  # a replaced picture has the same id and another SHA-256
both.selectExpr("texts[0].text AS human", "caption AS generated").show(8, truncate=60)
