"""What predictions are worth; no model is needed, and but for ``metrics`` no PyTorch.

In: predictions beside what is true, in memory or as CSV. Handed on: numbers with intervals, decisions, a report.
``predictions`` are what is evaluated, and ``cases`` makes those of cases from those of their images; ``scores``,
``subgroups`` and ``comparison`` answer, from ``measures`` over ``resampling``; ``decisions``, ``calibration`` and the
prediction sets of ``conformal`` are fitted to validation images; ``report`` and ``figures`` show; ``metrics`` are those
that a training logs.
"""
