"""Errors that are a user's to fix: one line that says what is wrong and what to do.

Anything else that is raised by this library is a bug and deserves its traceback.
"""


class QwenVLError(Exception):
    """The parent of every error below; the CLI prints it as one line and exits with status 2."""


class ConfigError(QwenVLError):
    """A configuration file or value that cannot be used."""


class CheckpointError(QwenVLError):
    """Weights that are missing, unknown, duplicated, wrongly shaped, truncated or unsafe."""


class ImageError(QwenVLError):
    """A picture that cannot be read, is too large, or that the policy does not allow to be read."""


class PromptError(QwenVLError):
    """Parts, turns, ids or image spans that do not make a prompt."""


class CacheError(QwenVLError):
    """A KV cache that is too small, or that was filled under another NTK alpha."""
