"""Modules for the kinds of sources of an ingest, each of which returns a `Source` (`source.py`) with undecoded rows.

Start reading in `open.py`. To add a kind of source, write its config class (`pipelines.config.data`), a module here, a
module of the same name with the parser in `pipelines.executor.ingest.records`, and its cases in `open.py`.
"""
