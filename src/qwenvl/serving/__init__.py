"""The model behind HTTP: an OpenAI-compatible server."""
