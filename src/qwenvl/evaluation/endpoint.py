"""Who judges: anything that answers messages, such as a model behind an OpenAI-compatible endpoint.

Judge           what answers messages with a text
OpenAIJudge     one behind an endpoint
NoVerdict       why there is no answer, or none of use
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Literal, Protocol, TypeAlias
from urllib.parse import unquote, urlsplit

from ..errors import ConfigError

Message: TypeAlias = "dict[str, str]"
Failure = Literal[
    "time-out",
    "no connection",
    "HTTP error",
    "no completion",
    "refusal",
    "empty reply",
    "no two numbers",
    "out of range",
]
SECRET = 8  # characters: what is shorter, such as "EMPTY", is no secret, and may be part of any reply


class NoVerdict(Exception):
    """Why there are no scores: the kind of failure, and more about it, without secrets."""

    def __init__(self, kind: Failure, what: str = "") -> None:
        super().__init__(f"{kind}: {what}" if what else kind)
        self.kind, self.what = kind, what


class Judge(Protocol):
    """Whoever answers; several threads may ask at once."""

    @property
    def model(self) -> str:
        """Its name, for the transcript."""

    def __call__(self, messages: Sequence[Message]) -> str:
        """The reply. Raises NoVerdict, or OSError where nobody can be reached."""


class OpenAIJudge:
    """A model behind an endpoint that speaks as OpenAI's does, at temperature 0.

    `url` ends in "/v1", as a rule. `key` names the environment variable that holds the key; neither the key nor a
    password in the URL gets into an error, a reply or a transcript. An attempt may take `timeout` seconds, and
    `retries` more are made, with growing pauses, where the endpoint is busy, broken or silent. Raises ConfigError.
    """

    def __init__(
        self, url: str, model: str, key: str = "OPENAI_API_KEY", timeout: float = 120.0, retries: int = 3
    ) -> None:
        try:
            import openai
        except ImportError:
            raise ConfigError("a judge is asked with the openai package: pip install 'qwenvl[eval]'") from None
        if not re.fullmatch("[A-Z_][A-Z0-9_]*", key):  # which may be the key itself, so it is not shown
            raise ConfigError("the judge's key should be given as the name of an environment variable, in capitals")
        secret = os.environ.get(key, "").strip()
        if not secret or not secret.isascii():
            raise ConfigError(f"{key} should hold the judge's key; for an endpoint that needs none, any word will do")
        try:
            parts = urlsplit(url)
            whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            whole = False
        if not whole:
            raise ConfigError("the judge's URL should be like https://host/v1")
        self.model = model
        self._secrets = [text for text in (secret, unquote(parts.password or "")) if len(text) >= SECRET]
        self._openai = openai
        self._client = openai.OpenAI(base_url=url, api_key=secret, timeout=timeout, max_retries=retries)

    def __call__(self, messages: Sequence[Message]) -> str:
        """The reply. Raises NoVerdict."""
        # What an endpoint writes about an error may hold what it was sent, headers too: the status has to do.
        failed = self._openai
        try:
            asked: Any = list(messages)
            answer = self._client.chat.completions.create(model=self.model, messages=asked, temperature=0)
            choice = answer.choices[0]
            text, refusal, ended = choice.message.content, choice.message.refusal, choice.finish_reason
        except failed.APITimeoutError:
            raise NoVerdict("time-out") from None
        except failed.APIStatusError as error:
            known = error.status_code in {status.value for status in HTTPStatus}
            phrase = HTTPStatus(error.status_code).phrase if known else ""
            raise NoVerdict("HTTP error", f"{error.status_code} {phrase}".strip()) from None
        except failed.APIConnectionError:
            raise NoVerdict("no connection") from None
        except (failed.OpenAIError, ValueError, AttributeError, IndexError, TypeError):
            raise NoVerdict("no completion", "the endpoint's answer is not in OpenAI's form") from None
        if refusal or ended == "content_filter":
            raise NoVerdict("refusal", self._public(refusal or ended))
        return self._public(text) if isinstance(text, str) else ""

    def _public(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text
