"""Pure functions from statistics to a loss: no model, no layout, no vocabulary axis.

Shape legend: T response tokens of a micro-batch, N sequences, P = N / 2 preference pairs.
"""
