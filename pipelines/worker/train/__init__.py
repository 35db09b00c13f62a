"""A rank's training: the learner, its stages, checkpoints and validation.

Start reading in `learner.py`; the loop itself is `vlm.training.loop`. May import torch; never pyspark, MLflow or Delta.
"""
