"""Settings of all notebooks in this folder. Change the settings here, then restart Python in open notebooks."""

RUN = "demo"
"""Name of a run: a file in conf/run/."""
WORKSPACE = (
    *("platform.catalog=main", "platform.schema=lakesight", "platform.volume=files", "platform.ranks=2"),
    "platform.experiment=/Users/me@example.com/lakesight-dev",
)
"""Names of the deployed resources, which `databricks bundle summary` prints, and the number of ranks.

On a laptop, WORKSPACE is not used.
"""
SMALL = (
    *("data.source.path=scenes:300", "train.steps=40", "train.validate_every=20", "train.checkpoint_every=40"),
    *("train.validate_rows=16", "gate.baselines=[]", "gate.min_blind_gap=-10", "gate.max_error_share=1"),
)
"""Settings for a run of about one minute. The model of the run does not describe pictures yet. For a useful model,
write SMALL = ()."""
