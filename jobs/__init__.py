"""The commands of `lakesight`, with one module per command, next to the job files that deploy them on Databricks.

Each command parses its options, loads the config, opens the platform and calls the other packages. Commands import
heavy libraries inside functions, so that `lakesight --help` prints at once.
"""
