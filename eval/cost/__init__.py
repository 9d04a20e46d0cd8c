"""Measure what guidance costs: ``python -m eval.cost``."""
