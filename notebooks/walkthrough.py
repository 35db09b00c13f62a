# Databricks notebook source
# MAGIC %md
# MAGIC # Lakesight, step by step
# MAGIC
# MAGIC This notebook goes from base64 pictures in a CSV file to captions in a Delta table, with one stage per section.
# MAGIC The notebook runs for one or two minutes.
# MAGIC
# MAGIC * **On a laptop**, run `python notebooks/walkthrough.py`, or open the file as a notebook in your editor.
# MAGIC * **In a workspace**, use a cluster with an ML runtime in dedicated access mode. Install the wheel
# MAGIC   (`%pip install /Volumes/.../lakesight-0.1.0-py3-none-any.whl`) and set the first two values of the next cell.

# COMMAND ----------

PLATFORM = "local"  # "databricks" in a workspace
# A workspace needs ["platform.catalog=main", "platform.schema=you", "platform.volume=files", "platform.ranks=2"].
WORKSPACE = []
SMALL = ["train.steps=40", "train.validate_every=20", "train.checkpoint_every=40", "train.validate_rows=16"]

# COMMAND ----------

# MAGIC %md
# MAGIC ## Load the config of a run
# MAGIC The config of a run consists of four YAML files under `conf/`: model, data, train and platform. `load_run`
# MAGIC resolves these files into one immutable object. Every setting can be overridden. A misspelled key raises an
# MAGIC error that names the nearest valid key.

# COMMAND ----------

from pipelines.config import load_run
from pipelines.platform import open_platform

config = load_run("demo", platform=PLATFORM, overrides=[*WORKSPACE, *SMALL, "data.source.path=scenes:300"])
platform = open_platform(config.platform)
source = config.chosen.data
spark = platform.open_spark()

# COMMAND ----------

# MAGIC %md
# MAGIC ## Ingest
# MAGIC Executors decode the pictures. Good rows go to the table `samples`, and bad rows go to the table `quarantine`
# MAGIC with a reason. The report shows how the numbers of rows add up: rows in = new + merged + duplicates +
# MAGIC quarantined. If you run the cell again, the ingest adds no row.

# COMMAND ----------

from pipelines.driver.ingest.run import ingest

ingested = ingest(spark, platform, source, config.data)
print(ingested)
spark.table(platform.table("quarantine")).groupBy("reason").count().show()

# COMMAND ----------

# MAGIC %md
# MAGIC ## Write shards
# MAGIC `shard` writes the rows of one version of the table `samples` to Arrow files, which every rank maps into memory.
# MAGIC The name of the shard folder contains a hash of the inputs, so `shard` finds and reuses existing shards.

# COMMAND ----------

from pipelines.driver.shard.run import shard

train_shards, validation_shards, evaluation_shards = (
    shard(spark, platform, source, config.data, config.model.image, split)
    for split in ("train", config.data.validate_on, config.data.evaluate_on)
)
print(train_shards)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Train
# MAGIC In a workspace, the driver starts the ranks with TorchDistributor. On a laptop, the driver starts the ranks as
# MAGIC child processes. The ranks train on the shards and write metrics and checkpoints to the run folder. The driver
# MAGIC logs the metrics to MLflow. The run is finished when the file `result.json` exists. If you run the cell again,
# MAGIC the finished run is reused.

# COMMAND ----------

from pipelines.driver.train.run import launch, prepare
from pipelines.driver.train.run_folders import finished_result
from pipelines.formats.run_owner import own_run
from pipelines.tracking.download import download
from pipelines.tracking.registry import register
from pipelines.tracking.runs import follow

run = prepare(config, platform, train_shards, validation_shards)
with own_run(run), follow(run, config, platform) as follower:
    result = finished_result(run) or launch(run, platform, lambda: spark)
version = register(run, follower.run_id, platform)
print(result.metrics)
print(version)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Evaluate
# MAGIC Captions and losses are computed on pictures that training has not seen. The *blind gap* is the increase of the
# MAGIC loss when the model gets the picture of another row. A model whose blind gap is near zero does not use its
# MAGIC pictures, and `lakesight promote` refuses this model. After only 40 training steps, the blind gap is still near
# MAGIC zero. Evaluation also measures two baselines: the best constant caption and the caption of the most similar
# MAGIC training picture.

# COMMAND ----------

from pathlib import Path

from pipelines.driver.evaluate.run import evaluate
from pipelines.driver.model_files import ModelFiles

folder, digest = download(platform, version)
model = ModelFiles(
    folder=folder, name=version.name, version=version.version, run_id=version.run_id, digest=digest
)
evaluation = evaluate(spark, platform, model, Path(evaluation_shards.folder), Path(train_shards.folder))
for metric, interval in evaluation.metrics.items():
    print(f"{metric:<18} {interval.value:8.3f}  ({interval.low:.3f} to {interval.high:.3f})")
print(evaluation.gallery)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Caption
# MAGIC A Spark job captions the rows that this model version has not captioned yet, and stores lineage and errors with
# MAGIC the captions. The job can caption any Delta table with an id column and a picture column.

# COMMAND ----------

from pipelines.driver.caption.run import CaptionRequest, caption

captioned = caption(spark, platform, model, CaptionRequest(where="split = 'test'"))
print(captioned)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Compare with human texts
# MAGIC After 40 training steps, the captions are grammatical but do not describe the pictures. `lakesight demo` trains
# MAGIC a model for more steps, and the captions of that model describe the pictures.

# COMMAND ----------

samples = spark.table(platform.table("samples"))
captions = spark.table(platform.table("generated_captions")).where(f"source_table = '{captioned.source_table}'")
both = captions.join(samples, ["image_id", "sha256"])  # a replaced picture has the same id and another SHA-256
both.selectExpr("texts[0].text AS human", "caption AS generated").show(8, truncate=False)
