"""What is learned from (paper, section 4.1).

In: folders, CSV files and image files of any kind. Handed on: a manifest with splits, and images as arrays and tensors.
``manifest`` is a data set, ``sources`` reads one, ``splits`` draws and checks; ``images``, ``dicom`` and ``pages`` read
files, ``transforms`` makes them what networks take, ``prefetch`` prepares batches ahead.
"""
