"""Functions that read pictures whose paths or URLs are in the rows of a source. No path or URL of a picture can lead
out of the root folder or root URL.

Start reading in `root.py`, which uses `files.py` for local files, and `urls.py` for web servers and object stores.
"""
