"""The commands: one thin module each (parse, load the config, open the platform, call), beside its deployed job.

Only this room composes the others: the driver must not know MLflow, tracking must not know Spark jobs. Nothing heavy is
imported at module level, so that `lakesight --help` answers at once.
"""
