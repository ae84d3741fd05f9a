"""Errors that are a user's to fix: one line that says what is wrong and what to do.

Anything else that is raised by this library is a bug and deserves its traceback.
"""

import unicodedata


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


def printable(text: str) -> str:
    """The text without control characters other than line ends and tabs: a model's bytes may spell escape sequences."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def told(error: QwenVLError) -> str:
    """One line, whatever the names in it hold."""
    return "error: " + " ".join(printable(str(error)).splitlines())
