"""Trained models outside a training.

In: a checkpoint. Handed on: the model that it holds (``checkpoints``), predictions in Python (``predictor``), one file
for other programs (``export``).
"""
