"""Picture files as bytes: what of a file decides its pixels, and how the picture is turned upright.

`vlm.image` uses these modules before and after Pillow decodes a file. None of them changes a pixel.
"""
