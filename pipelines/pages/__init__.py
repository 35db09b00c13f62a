"""HTML pages of every report, gallery and the review server, from one base template, style sheet, card and filter.

Start reading in `page.py`; `thumbnail.py` makes the small pictures. Imports Jinja and Pillow; never pyspark, torch or
MLflow.
"""
