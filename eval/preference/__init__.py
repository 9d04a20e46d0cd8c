"""Human preferences: ``python -m eval.preference``."""
