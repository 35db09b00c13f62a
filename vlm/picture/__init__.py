"""Removal of metadata from picture files, and conversion of decoded pictures to upright RGB pictures.

`vlm.image` uses the modules of this package before and after Pillow decodes a file.
"""
