"""Import of weights published by other libraries, and export to their formats.

In `vlm`, only this package's code contains names of model families and tensor names of other libraries. Start reading
in `tables/gpt2.py`, which describes GPT-2; continue with `rules.py` and `load.py`.

rules.py          rules for conversions between another library's tensors and our parameters (rename, split, ...)
accounting.py     list of keys without effect, and a record of the keys of config.json that were read
config_fields.py  fields that map config values between our config and config.json
family.py         class `Family`: config fields, weight table, and the function that recognises a config.json
tables/           modules that define the families, and the function `families`, which returns all families
plan.py           comparison of a weight table with a model and a weight file, and the list of all mismatches
files.py          functions that read and write safetensors files and shards, and refuse pickle files
key_rules.py      rules for the keys of the JSON files next to config.json
picture_keys.py   preprocessing of pictures in processor_config.json and preprocessor_config.json
generation_keys.py  generation settings in generation_config.json
tensor_sizes.py   comparison of sizes in config.json with the shapes of the tensors
special_tokens.py comparison of start and end tokens in the files of a folder with the tokenizer
load.py           import of another library's folder into a model
published_model.py  whole published models, whose config is derived from the files of the folder
export.py         export of a checkpoint to a folder for another library
"""
