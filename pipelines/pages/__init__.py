"""HTML pages of every report, gallery and the review server.

All pages share one base template, one style sheet, one card and one filter (`templates/`). Start reading in `page.py`.
`thumbnail.py` makes the small pictures. Imports Jinja and Pillow; never pyspark, torch or MLflow.
"""
