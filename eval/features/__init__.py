"""Networks that grade images, their cached features, and reference sets."""
