"""The embedded default: a closed world of captioned landscapes with known truth, and the pipeline trained on it."""
