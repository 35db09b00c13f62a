# Databricks notebook source
# MAGIC %md
# MAGIC # Lakesight, step by step
# MAGIC
# MAGIC From base64 pictures in a CSV to captions in a Delta table, one call a cell, at a size that takes a minute or two.
# MAGIC
# MAGIC * **On a laptop** run the file as it is: `python notebooks/walkthrough.py`, or open it as a notebook in your editor.
# MAGIC * **In a workspace** install the wheel first (`%pip install /Volumes/.../lakesight-0.1.0-py3-none-any.whl`), use a
# MAGIC   cluster with an ML runtime in dedicated access mode, and set the two values of the next cell.

# COMMAND ----------

PLATFORM = "local"  # in a workspace: "databricks"
WHERE = []  # in a workspace: ["platform.catalog=main", "platform.schema=you", "platform.volume=files", "platform.ranks=2"]
SMALL = ["train.steps=40", "train.validate_every=20", "train.checkpoint_every=40", "train.validate_rows=16"]

# COMMAND ----------

# MAGIC %md
# MAGIC ## A run is four names
# MAGIC Model, data, train and platform: YAML files under `conf/`, resolved into one frozen object. Anything can be
# MAGIC overridden, and a misspelled key is an error that names the nearest valid one.

# COMMAND ----------

from pipelines.config import load_run
from pipelines.platform import open_platform

config = load_run("demo", platform=PLATFORM, overrides=[*WHERE, *SMALL, "data.source.path=scenes:300"])
platform = open_platform(config.platform)
source = config.chosen.data
spark = platform.open_spark()

# COMMAND ----------

# MAGIC %md
# MAGIC ## Ingest
# MAGIC Executors decode the pictures. Good rows go to `samples`, bad ones to `quarantine` with the reason, and the report
# MAGIC adds up: rows in = new + merged + duplicates + quarantined. Run the cell twice: the second time nothing is new.

# COMMAND ----------

from pipelines.driver.ingest.run import ingest

ingested = ingest(spark, platform, source, config.data)
print(ingested)
spark.table(platform.table("quarantine")).groupBy("reason").count().show()

# COMMAND ----------

# MAGIC %md
# MAGIC ## Shards
# MAGIC `samples` at a pinned version becomes Arrow files that every rank maps into memory. The folder's name is a hash of what
# MAGIC determines its content, so asking twice writes once.

# COMMAND ----------

from pipelines.driver.shard import shard

learn_from, validate_on, evaluate_on = (
    shard(spark, platform, source, config.data, config.model.image, split)
    for split in ("train", config.data.validate_on, config.data.evaluate_on)
)
print(learn_from)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Train
# MAGIC TorchDistributor starts the ranks; they learn from the shards and write into the run folder. The driver follows the
# MAGIC metric files into MLflow and believes nothing but `result.json`. Run the cell again: the finished run is found.

# COMMAND ----------

from pipelines.driver.train.run import finished_result, launch, prepare
from pipelines.tracking.registry import download, register
from pipelines.tracking.runs import follow

run = prepare(config, platform, learn_from, validate_on)
with follow(run, config, platform) as run_id:
    result = finished_result(run) or launch(run, platform, spark)
version = register(run, run_id, platform)
print(result.metrics)
print(version)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Evaluate
# MAGIC Captions and losses on pictures that no rank has seen. The *blind gap* is how much worse the model fares with somebody
# MAGIC else's picture: a model with a gap near zero does not look, and `lakesight promote` refuses it. After so few steps
# MAGIC this one is about there. What needs no model is measured too: one caption for all, and the nearest neighbour's.

# COMMAND ----------

from pathlib import Path

from pipelines.driver.evaluate.run import evaluate
from pipelines.driver.model_files import ModelFiles

model = ModelFiles(
    folder=download(platform, version), name=version.name, version=version.version, run_id=version.run_id
)
evaluation = evaluate(spark, platform, model, Path(evaluate_on.folder), Path(learn_from.folder))
for metric, interval in evaluation.metrics.items():
    print(f"{metric:<18} {interval.value:8.3f}  ({interval.low:.3f} to {interval.high:.3f})")
print(evaluation.gallery)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Caption
# MAGIC A Spark job captions the rows that this version has not captioned yet, with lineage and an error column. It works on
# MAGIC any Delta table with an id and a picture column.

# COMMAND ----------

from pipelines.driver.caption.run import CaptionRequest, caption

captioned = caption(spark, platform, model, CaptionRequest(where="split = 'test'"))
print(captioned)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Look
# MAGIC What people wrote, and what the model writes. After 40 steps it has found the grammar, not yet the picture:
# MAGIC `lakesight demo` trains long enough.

# COMMAND ----------

samples = spark.table(platform.table("samples"))
captions = spark.table(platform.table("generated_captions"))
captions.join(samples, "image_id").selectExpr("texts[0].text AS human", "caption AS generated").show(8, truncate=False)
