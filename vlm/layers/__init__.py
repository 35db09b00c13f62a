"""Layers of a transformer: attention, masks, rotary positions, MLPs, mixture of experts and the key-value cache.

The layers take and return tensors, and the modules of this package do not import `vlm.config`. Start reading in
`block.py`.
"""
