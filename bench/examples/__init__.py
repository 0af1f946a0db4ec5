"""Whole models: ``rows(size, repeat, limits)``; the size is the model's own."""
