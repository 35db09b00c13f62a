"""The review server, which shows a page on which people judge captions, and stores their verdicts in a table.

Start reading in `server.py`. The package needs neither Spark nor torch: `delta_store.py` reads and writes local Delta
tables as files, and `warehouse_store.py` reads and writes the tables of a workspace through a SQL warehouse.
"""
