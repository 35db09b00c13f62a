"""Training in a rank: the trainer, its stages, initial weights, checkpoints and validation.

Start reading in `trainer.py`; the training loop itself is `vlm.training.loop`. The package may import torch, but never
pyspark, MLflow or Delta.
"""
