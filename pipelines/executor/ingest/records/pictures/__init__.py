"""Functions that read the pictures that rows name by paths or URLs. No path or URL of a picture can lead out of the
root folder or root URL.

Start reading in `root.py`, which uses `files.py` for local files, and `urls.py` for web servers and object stores.
"""
