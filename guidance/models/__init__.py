"""Pipelines by name, and what is known of their denoisers: layouts, inputs, conditions, CLIP."""
