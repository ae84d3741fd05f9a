"""Whole trainings from nothing, each by one command."""
