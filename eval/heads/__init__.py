"""Measure saved heads: ``python -m eval.heads``."""
