"""Metrics and statistics of a comparison: what is measured on images, and what may be concluded from it."""
