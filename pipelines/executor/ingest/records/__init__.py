"""Parsers of the source formats: raw rows of one kind of source become `Record`s.

One module per kind, with the same names as in `pipelines.driver.ingest.sources`. Start reading in `record.py`.
Nothing here decides whether a record is a valid sample: `pipelines.executor.ingest.decode` does.
"""
