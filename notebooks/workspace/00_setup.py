# Databricks notebook source
# MAGIC %md
# MAGIC # Check the workspace
# MAGIC
# MAGIC Like the jobs of the bundle, the notebooks of this folder run stages, with one or more stages per notebook.
# MAGIC First deploy the bundle: the deployment creates the schema, the Volume and the experiment. Then write the names
# MAGIC of these resources into `notebook_settings.py`.
# MAGIC
# MAGIC * **In a workspace**, use a cluster with an ML runtime in dedicated access mode, and install the wheel on this
# MAGIC   cluster (`%pip install /Volumes/.../lakesight-0.1.0-py3-none-any.whl`). All nodes of the cluster need the
# MAGIC   wheel, because ranks and executors run on these nodes.
# MAGIC * **On a laptop**, run `python notebooks/workspace/00_setup.py`.

# COMMAND ----------

from jobs.common import open_notebook
from notebook_settings import RUN, SMALL, WORKSPACE

job = open_notebook(RUN, WORKSPACE, SMALL)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Run all checks
# MAGIC In a workspace, the checks test the runtime, the packages, the Volume, the tables, MLflow and the package
# MAGIC index. Run the next notebooks only after all checks have passed. The text after `fix:` says how to correct a
# MAGIC problem.

# COMMAND ----------

from jobs.doctor import run_checks

checks = run_checks(job.config)
for check in checks:
    print(f"{check.name:<12}{check.status:<6}{check.found}")
    if check.fix:
        print(f"{'':<18}fix: {check.fix}")
