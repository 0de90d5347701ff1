"""Iterative preference tuning of language models on a Ray cluster."""
