"""Model library: configuration, layers, tokenizers, training and generation of vision-language models.

The library never imports `pipelines`, Spark or MLflow, and the modules `vlm.config`, `vlm.errors`, `vlm.files`,
`vlm.image` and `vlm.text` even work without PyTorch. Start reading in `model.py`, which holds the forward pass, and
continue with `factory.py`, which builds a model from its config.
"""
