"""The commands of `lakesight`, one module per command, and the files of the Databricks jobs that run the commands.

Most commands load the config of a run, open its platform, and call the other packages. Commands import heavy libraries
inside functions, so that `lakesight --help` prints at once.
"""
