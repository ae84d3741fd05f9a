"""`qwenvl quantize`: a checkpoint folder in, a packed one out."""

SAMPLES = 128  # conversations to calibrate with, as many as in the GPTQ paper
