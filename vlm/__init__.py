"""The model library: configs, layers, text, training and generation of a vision-language model. PyTorch only."""
