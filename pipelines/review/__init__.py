"""The review server, which shows a page on which people judge captions, and stores their verdicts in a table.

Start reading in `server.py`. The package needs neither Spark nor torch, because `verdicts.py` reads and writes Delta
tables as files.
"""
