"""What a server allows: how much at once, how large, how long, from where.

Settings   the limits, as a frozen dataclass; the command line's defaults are these
keys_of    API keys, from a file
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ConfigError
from ..fetch import SERVER_POLICY, ImagePolicy


@dataclass(frozen=True)
class Settings:
    """The limits of a server. Sizes are bytes or pixels, times seconds.

    name                  what the model is called in answers; default, the checkpoint's own name without its folder
    rows, max_length      of the engine; see `qwenvl.Engine`
    queue                 answers that may wait beside those that are computed; more are refused with 429
    timeout               from a request's arrival to the end of its answer
    body_timeout          for a request's body to arrive
    grace                 what runs when the server is told to stop may go on for so long
    max_body_bytes        of a request; of all that are being answered, sixteen times as many
    max_images            of a request, its whole conversation
    max_image_bytes       of a picture's file
    max_image_pixels      width times height, looked up in the header before anything is decoded
    max_choices           answers that one request may ask for: its `n` times its prompts
    allowed_domains       hosts (and their subdomains) that pictures may be fetched from; none by default
    fetch_timeout         of such a fetch, redirects included
    api_keys              if there are any, `/v1` asks for one of them, and so does the page
    hosts                 names by which the server may be asked, beside its addresses; any, if there are none
    cors_origins          whose pages may call the API from a browser; none by default
    """

    name: str | None = None
    rows: int | None = None
    max_length: int | None = None
    queue: int = 64
    timeout: float = 300.0
    body_timeout: float = 30.0
    grace: float = 30.0
    max_body_bytes: int = 32 << 20
    max_images: int = 16
    max_image_bytes: int = 16 << 20
    max_image_pixels: int = 40_000_000
    max_choices: int = 16
    allowed_domains: tuple[str, ...] = ()
    fetch_timeout: float = 10.0
    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("timeout", "body_timeout", "grace", "fetch_timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a number of seconds above 0, not {getattr(self, name)!r}")
        for name in ("max_body_bytes", "max_images", "max_image_bytes", "max_image_pixels", "max_choices"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a whole number from 1 up, not {getattr(self, name)!r}")
        if self.queue < 0:
            raise ConfigError(f"queue must be a whole number from 0 up, not {self.queue!r}")
        if not all(key.strip() for key in self.api_keys):
            raise ConfigError("an API key is empty: anyone could guess it")

    @property
    def policy(self) -> ImagePolicy:
        """What pictures may be read from: never local files; URLs of the allowed domains alone."""
        return replace(
            SERVER_POLICY,
            allow_urls=bool(self.allowed_domains),
            allowed_domains=self.allowed_domains,
            max_bytes=self.max_image_bytes,
            max_pixels=self.max_image_pixels,
            timeout=self.fetch_timeout,
        )


def keys_of(file: str | Path) -> tuple[str, ...]:
    """The API keys of a file with one a line. Raises ConfigError where it cannot be read, or holds none."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the API keys: {error}") from None
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise ConfigError(f"{file} holds no API key: write one a line")
    return keys
