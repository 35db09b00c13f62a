"""Picture files and decoded pictures: what of a file decides its pixels, and how they become upright RGB pictures.

`vlm.image` uses these modules before and after Pillow decodes a file.
"""
