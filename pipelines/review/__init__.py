"""The review server: a page on which people judge captions, and the table of their verdicts.

Start reading in `server.py`. May import deltalake; never pyspark, torch or MLflow.
"""
