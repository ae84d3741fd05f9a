"""Texts on their way: ids become deltas as they are read.

TextStream   the deltas of a text
ChatStream   of a reply, and the history with it
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence

from ..text.parts import Part, Turn
from ..text.stream import ReplyStream
from .request import Request


class TextStream(Iterator[str]):
    """The deltas of a text. `text` is what has come so far; `request` is the engine's, if one computes it.

    Stop whenever you like: `close` it then, which an engine must be told.
    """

    def __init__(self, ids: Generator[int] | Request, reply: ReplyStream, stop_ids: Sequence[int]) -> None:
        self.request = ids if isinstance(ids, Request) else None
        self._end = ids.cancel if isinstance(ids, Request) else ids.close
        self._deltas = _deltas(ids, reply, stop_ids)
        self.text = ""

    def __next__(self) -> str:
        try:
            delta = next(self._deltas)
        except BaseException:  # the end, or what went wrong: either way, what has been computed is still good
            self.close()
            raise
        self.text += delta
        return delta

    def close(self) -> None:
        """Stop here. Of no effect where it has ended."""
        self._deltas.close()
        self._end()


class ChatStream(Iterator[str]):
    """The deltas of one reply. When they are through (or whenever you stop), `reply` and `history` say what came.

    `keep` is called once, at the end: what computed the reply can be used again.
    """

    def __init__(self, stream: TextStream, history: list[Turn], parts: list[Part], keep: Callable[[], None]) -> None:
        self._stream, self._history, self._parts = stream, history, parts
        self._keep: Callable[[], None] | None = keep

    def __next__(self) -> str:
        try:
            return next(self._stream)
        except BaseException:
            self.close()
            raise

    @property
    def request(self) -> Request | None:
        """The engine's, if one computes the reply: what was used again, why it ended, how many ids."""
        return self._stream.request

    @property
    def reply(self) -> str:
        """What has been said so far."""
        return self._stream.text

    @property
    def history(self) -> list[Turn]:
        """The history given, and this turn with what has been said so far."""
        return [*self._history, Turn(self._parts, self.reply)]

    def close(self) -> None:
        """Stop here. The conversation's cache goes back to the pipeline, for the next round."""
        self._stream.close()
        keep, self._keep = self._keep, None  # once: by the next time, another reply may be using it
        if keep is not None:
            keep()


def _deltas(ids: Iterator[int], reply: ReplyStream, stop_ids: Sequence[int]) -> Generator[str]:
    for id_ in ids:
        if id_ not in stop_ids and (delta := reply.push(id_)):
            yield delta
        if reply.stopped:
            break
    if delta := reply.flush():
        yield delta
