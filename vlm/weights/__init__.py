"""Import of weights published by other libraries, and export to their formats.

Only this package knows the names of model families and of other libraries' tensors: `load.import_weights` and
`export.export_weights` use them, `tables.families` lists them. Start reading in `tables/gpt2.py`, the description of
one family, then `rules.py` and `load.py`.

rules.py          rules that map tensors by name (rename, transpose, concat, ...), each with its inverse
config_fields.py  fields that map config values between our config and config.json
family.py         a family: its config fields, its weight table, and how its files are recognised
tables/           one module per family; every module in it is found automatically
plan.py           comparison of a table with a model and a file, and the list of everything that does not fit
files.py          safetensors files and shards, read tensor by tensor; pickle files are refused
load.py           from another library's folder to a model
export.py         from a checkpoint to another library's folder
"""
