"""Training in a rank: the trainer, its stages, initial weights, checkpoints and validation.

Start reading in `run.py`, then `trainer.py`, which calls the training loop in `vlm.training.loop`. The package may
import torch, but never pyspark, MLflow or Delta.
"""
