"""Modules that open the sources of an ingest. Each module opens one kind of source and returns a `Source`.

A `Source` (`source.py`) has undecoded rows. Start reading in `open.py`. To add a kind of source, write a config class
(`pipelines.config.data`) and a module in this package. Write the parser in a module of the same name in
`pipelines.executor.ingest.records`, and add the cases to `open.py`.
"""
