"""Sources of an ingest. Each kind of source has a module, which returns a `Source` (`source.py`) with undecoded rows.

Start reading in `open.py`. A new kind of source is a module here, a module of the same name in
`pipelines.executor.ingest.records` with its parser, and a case in `open_source`.
"""
