"""The comparison of arms: images, metrics, results, files."""
