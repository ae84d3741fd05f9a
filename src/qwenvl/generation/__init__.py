"""Logits in, ids out: sampling, the one decoding loop, beam search."""
