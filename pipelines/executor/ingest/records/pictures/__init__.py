"""Pictures that rows name by paths or URLs, read from below one root folder or URL that nothing leads out of.

Start reading in `root.py`, which reads local files with `files.py`, and web servers and object stores with `urls.py`.
"""
