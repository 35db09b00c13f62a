"""Files that only some run folders have, and functions that read files of a run while the run is in progress.

The files of every run are described in `run_folder.py`, which all modules of this package import.
"""
