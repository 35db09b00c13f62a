"""Removal of metadata from picture files, and conversion of decoded pictures to upright RGB pictures.

`vlm.image` uses these modules before and after Pillow decodes a file.
"""
