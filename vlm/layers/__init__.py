"""Layers of the transformers: attention, masks, rotary positions, MLPs, mixture of experts and the key-value cache.

They take and return tensors and import only torch and each other, no configuration. Start reading in `block.py`.
"""
