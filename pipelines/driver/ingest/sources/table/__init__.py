"""Modules that open a Delta table as a source of an ingest.

Start reading in `open.py`, which selects the rows to read. `changes.py` finds the rows that changed since the last
ingest in the table's change data feed.
"""
