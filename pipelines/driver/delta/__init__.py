"""What every stage asks of Delta: tables, their versions, retries, Spark settings, and `maintain`.

Start reading in `tables.py`. May import pyspark and delta; never torch or MLflow, and no stage of the driver.
"""
