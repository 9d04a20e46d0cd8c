"""Data sets, prompts, edit pairs, and features on the disk."""
