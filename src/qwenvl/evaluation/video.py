"""Frames of a video file, by number, decoded with PyAV.

Video          what `frames` asks of a video
IndexedVideo   frames are numbered by the file's time stamps: what is long is not decoded whole
DecodedVideo   frames are numbered as they come out of the decoder
BrokenVideo    why a video cannot be decoded

The reference has one decoder of each kind, whose numbers differ where a file is damaged. Neither keeps frames: a video
may be an hour long.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ..errors import QwenVLError


class BrokenVideo(Exception):
    """Why a video cannot be decoded."""


class Video(Protocol):
    """A video whose frames are numbered from 0."""

    @property
    def length(self) -> int:
        """Frames."""

    @property
    def rate(self) -> float:
        """Frames in a second, on average; 0 if the file does not say."""

    def frames(self, wanted: Sequence[int]) -> Iterator[Image.Image]:
        """The frames of these numbers, which never fall. Raises BrokenVideo."""


class IndexedVideo:
    """Frames in the order of their time stamps, each found from the key frame before it.

    To know the time stamps the whole file is read once, but not decoded. Raises BrokenVideo, QwenVLError without PyAV.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        times, keys = array("q"), array("q")  # an hour has 216,000 frames
        with _opened(path) as (container, stream):
            self.rate = float(stream.average_rate or 0)
            for packet in container.demux(stream):
                if packet.pts is not None:  # the last packet, which is none, has no time
                    times.append(packet.pts)
                    if packet.is_keyframe:
                        keys.append(packet.pts)
        if not times:
            raise BrokenVideo("it has no frame with a time stamp")
        self._times, self._keys = sorted(times), sorted(keys)
        self.length = len(times)

    def frames(self, wanted: Sequence[int]) -> Iterator[Image.Image]:
        """The frames of these numbers. Raises BrokenVideo."""
        with _opened(self._path) as (container, stream):
            for number in wanted:
                yield self._seek(container, stream, number) or self._from_start(number)

    def _seek(self, container: Any, stream: Any, number: int) -> Image.Image | None:  # noqa: ANN401 - PyAV
        """A frame, decoded from the key frame before it; None where the file was entered behind it."""
        time = self._times[number]
        before = bisect_right(self._keys, time)
        container.seek(self._keys[before - 1] if before else self._times[0], stream=stream)
        frames = _timed(container, stream)
        found = next(frames, None)
        return None if found is None or found.pts > time else self._reached(chain([found], frames), number)

    def _from_start(self, number: int) -> Image.Image:
        """The same without a seek, which takes longer. Not all kinds of files can be sought in to a frame."""
        with _opened(self._path) as (container, stream):
            return self._reached(_timed(container, stream), number)

    def _reached(self, frames: Iterator[Any], number: int) -> Image.Image:
        """The first frame at the number's time or after it."""
        for frame in frames:
            if frame.pts >= self._times[number]:
                image: Image.Image = frame.to_image()
                return image
        raise BrokenVideo(f"it ends before frame {number} of {self.length}")


class DecodedVideo:
    """Frames as they come out of the decoder, from the first. Raises BrokenVideo, QwenVLError without PyAV."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _opened(path) as (container, stream):
            self.rate = float(stream.average_rate or 0)
            self.length = sum(1 for _ in container.decode(stream))

    def frames(self, wanted: Sequence[int]) -> Iterator[Image.Image]:
        """The frames of these numbers. Raises BrokenVideo."""
        numbers = iter(wanted)
        number = next(numbers, None)
        with _opened(self._path) as (container, stream):
            decoded = enumerate(container.decode(stream))
            while number is not None:
                at, frame = next(decoded, (number, None))
                if frame is None:
                    raise BrokenVideo(f"it ends before frame {number} of {self.length}")
                while at == number:  # which may be wanted twice
                    yield frame.to_image()
                    number = next(numbers, None)


def _timed(container: Any, stream: Any) -> Iterator[Any]:  # noqa: ANN401 - PyAV
    return (frame for frame in container.decode(stream) if frame.pts is not None)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A file and its first video stream. What PyAV raises within is raised as BrokenVideo."""
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise QwenVLError("videos are decoded with PyAV: pip install 'qwenvl[video]'") from None
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.video:
                raise BrokenVideo("it has no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"  # the same frames, on all cores
            yield container, stream
    except (FFmpegError, OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or str(error)
        raise BrokenVideo(" ".join(told.split()) or type(error).__name__) from None
