"""Where images, labels and stored features meet in batches (paper, sections 3.3 and 4.2).

In: a manifest, and a store or image files. Handed on: the batch of ``samples``. ``base`` has the data set and its
loaders, ``images`` reads files, ``preloaded`` a store, ``synthetic`` draws the quickstart's images.
"""
