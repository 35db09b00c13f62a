"""Parsers of the source formats: raw rows of one kind of source become `Record`s.

Start reading in `record.py`; each kind of source has one module, named as in `pipelines.driver.ingest.sources`. Whether
a record is a valid sample is decided in `pipelines.executor.ingest.decode`.
"""
