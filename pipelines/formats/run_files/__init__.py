"""Files of a run folder that only some runs have or that are read while a run goes on.

The files of every run are described in `run_folder.py`, which all modules of this package import.
"""
