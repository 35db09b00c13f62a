"""The review server: a page on which people judge captions, and the table `verdicts` of their judgements.

Start reading in `server.py`. The package needs neither Spark nor torch, because `verdicts.py` reads and writes Delta
tables as files.
"""
