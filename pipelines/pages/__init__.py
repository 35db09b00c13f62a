"""HTML pages of reports, galleries and the review server, all made from one base template and one style sheet.

Start reading in `page.py`, then `thumbnail.py`, which makes the small pictures. The package never imports pyspark,
torch or MLflow.
"""
