"""Parsers of the source formats, which turn raw rows of a source into objects of the class `Record`.

Start reading in `record.py`, then in the module for a kind of source, such as `csv.py` (on the driver, the module
`pipelines.driver.ingest.sources.csv` opens this kind of source). The module `pipelines.executor.ingest.decode` decides
whether a record is a valid sample.
"""
