"""Paired statistics, permutation tests, and tables of numbers with intervals."""
