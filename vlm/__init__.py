"""Model library: configuration, layers, tokenizers, training and generation of vision-language models.

It needs PyTorch and never imports `pipelines`, Spark or MLflow; `vlm.config`, `vlm.errors`, `vlm.files`, `vlm.image`
and `vlm.text` work without torch. Start reading in `model.py` (the forward pass), then `build.py` (config to model).
"""
