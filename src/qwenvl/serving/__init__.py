"""Answers over the network: an OpenAI-compatible API and a web page."""
