"""The commands of `lakesight`, one module per command, and the files of the Databricks jobs that run the commands.

Each command parses its options, loads the config, opens the platform and calls the other packages. Commands import
heavy libraries inside functions, so that `lakesight --help` prints at once.
"""
