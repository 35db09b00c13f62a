"""Layers of a transformer: attention, masks, rotary positions, MLPs, mixture of experts and the key-value cache.

The layers take and return tensors, and only `position.py` imports `vlm.config`. Start reading in `block.py`.
"""
