"""The review server: a page on which people judge captions, and the table `verdicts` of their judgements.

Start reading in `server.py`. Needs neither Spark nor torch: `verdicts.py` reads and writes Delta tables as files.
"""
