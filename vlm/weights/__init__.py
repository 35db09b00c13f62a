"""Import of weights published by other libraries, and export to their formats.

Only this package contains names of model families and tensor names of other libraries. Start reading in
`tables/gpt2.py`, the description of one family, then read `rules.py` and `load.py`.

rules.py          rules that convert another library's tensors to our parameters, and back (rename, transpose, ...)
config_fields.py  fields that map config values between our config and config.json
family.py         class of a family: config fields, weight table, and how the family's config.json is recognised
tables/           one module per family, and the function `families`, which finds all modules of this folder
plan.py           comparison of a weight table with a model and a weight file, and the list of all mismatches
files.py          functions that read and write safetensors files and shards, and refuse pickle files
load.py           import of another library's folder into a model
export.py         export of a checkpoint to a folder for another library
"""
