"""Modules for the kinds of sources of an ingest, each of which returns a `Source` (`source.py`) with undecoded rows.

Start reading in `open.py`. A new kind of source is a module here, a module of the same name in
`pipelines.executor.ingest.records` with its parser, and a case in `open_source`.
"""
