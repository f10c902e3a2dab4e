"""The feature store (paper, section 3.6).

In: a manifest and a frozen encoder. Handed on: stored keys and values by sample. ``preload`` is the frozen pass that
fills it; ``specification`` says what must match before it is used, ``layout`` where things lie, ``codecs`` how numbers
are coded; ``place`` and ``storage`` reach the files; ``index`` reads metadata and records, ``store`` features (through
``reader``), ``writing`` writes under ``lock``, ``damage`` finds what is broken, ``upgrade`` brings the format before up
to date.
"""
