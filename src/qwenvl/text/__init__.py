"""Strings in, ids out; never imports torch."""
