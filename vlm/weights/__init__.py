"""Weights from elsewhere and back: the only place in `vlm` that knows the names of families and of other libraries.

rules.py    name maps as data: rename, transpose, concat ..., each with its inverse
plan.py     a table met with a model and a file: what fills what, or everything that does not fit
facts.py    what both configs say, each in its own words
family.py   one family: its facts, its table, how its files are recognised
files.py    safetensors, one file or shards, read tensor by tensor; pickle is refused
load.py     from another library's folder to a model
export.py   from a model to another library's folder
tables/     the families, one readable file each; a file put there is found
"""
