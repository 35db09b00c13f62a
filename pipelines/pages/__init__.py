"""HTML pages that people open: one template and one style for every report.

Start reading in `page.py`. Imports Jinja alone: the driver, the review server and commands build pages from it.
"""
