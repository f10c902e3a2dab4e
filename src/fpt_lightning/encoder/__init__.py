"""The frozen vision transformer (paper, sections 3.2 and 3.5).

In: normalised images. Handed on: keys and values of each head's most important tokens, their indices and a pooled
feature. ``config`` says which encoder and what of it, ``weights`` reads its files, ``frozen`` taps its attention,
``selection`` decides which tokens matter.
"""
