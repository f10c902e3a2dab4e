"""What a run costs, before it runs (paper, section 4.2.2).

In: a method and its setting, nothing else. Handed on: ``memory``, counted or predicted on fake tensors, and what the
``planner`` makes of it.
"""
