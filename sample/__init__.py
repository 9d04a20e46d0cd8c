"""Scripts that sample."""
