"""Helpers that know nothing of diffusion: errors, files, configs, pictures, processes, tracking."""
