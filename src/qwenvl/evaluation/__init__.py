"""Benchmarks' metrics: what a model's answers are worth against people's."""
