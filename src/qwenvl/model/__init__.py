"""The paper: ids and pixels in, logits out. Read rope, cache, vision, resampler, decoder, qwenvl, in this order."""
