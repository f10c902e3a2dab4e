"""What a model looked at (paper, sections 4.5 and 4.7).

In: a trained model and its data. Handed on: ``attention`` as tensors and a test of it by deletion, ``pictures``, and
the ``writer`` that makes both for a data set.
"""
