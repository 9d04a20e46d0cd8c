"""Folders of sampled images: records, arms, guides by name, runs and sweeps."""
