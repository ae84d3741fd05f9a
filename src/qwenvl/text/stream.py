"""A reply as it is generated: text that can be shown now, and nothing that would have to be taken back.

ReplyStream   ids in, deltas out; knows stop strings and stripping
texts         stop strings or continuations as a caller gives them
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import PromptError
from .tokenizer import StreamDecoder, Tokenizer


def texts(given: str | Sequence[str] | None, what: str = "stop strings") -> tuple[str, ...]:
    """One text, several or none, as several. Raises PromptError for anything else, and for an empty text."""
    several = () if given is None else (given,) if isinstance(given, str) else given
    if not isinstance(several, Sequence) or any(not isinstance(text, str) or not text for text in several):
        raise PromptError(f"{what} must be texts of at least one character, not {given!r:.80}")
    return tuple(several)


class ReplyStream:
    """Turns new ids into deltas whose join is the decoded text before the first stop string, stripped if `strip`.

    Held back until it is clear that they belong to the reply: half a character, what may be the beginning of a stop
    string, and (if `strip`) white space that may be the last. Raises PromptError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str] = (), *, strip: bool = True) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop, self._strip = texts(stop), strip
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self._begun = False
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that this id makes certain, maybe none. `stopped` is true once a stop string is complete."""
        return self._release(self._decoder.push(token_id))

    def flush(self) -> str:
        """What is left when no more ids come."""
        delta = self._release(self._decoder.flush())
        rest, self._held = self._held, ""
        if self._strip:
            rest = rest.rstrip() if self._begun else rest.strip()
        return delta + rest

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        looked = max(len(self._held) - self._longest, 0)  # none begins before: it would have been found
        self._held += text
        ends = [at for at in (self._held.find(stop, looked) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            self._held = self._held[: min(ends)]
        certain = len(self._held) if self.stopped else len(self._held) - self._maybe_stop()
        if self._strip:
            certain = len(self._held[:certain].rstrip())
        delta, self._held = self._held[:certain], self._held[certain:]
        if self._strip and not self._begun:  # not before: white space can belong to a stop string
            delta = delta.lstrip()
            self._begun = bool(delta)
        if self.stopped:
            self._held = ""
        return delta

    def _maybe_stop(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        end = self._held[max(len(self._held) - self._longest + 1, 0) :]
        longest = 0
        for stop in self._stop:
            at = end.find(stop[0], max(len(end) - len(stop) + 1, 0))
            while at >= 0 and not stop.startswith(end[at:]):
                at = end.find(stop[0], at + 1)
            longest = max(longest, len(end) - at if at >= 0 else 0)
        return longest
