"""Metrics as functions of images and features."""
