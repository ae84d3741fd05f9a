"""Training: conversations and pictures in, weights that are better at them out."""
