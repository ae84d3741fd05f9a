"""How fast the model runs on this machine, and how far that is from what the machine could do."""
