"""Frames of SEED-Bench's videos, with which its questions are asked, cut as the reference does.

cut         all questions' frames, into `video_imgs_4/<question_id>_<k>.jpg` beside SEED-Bench.json
described   what was done, in lines
sampled     which of so many frames are taken
wanted      which frames of a video a question takes
video_of    where a question's video lies
Cut         what was done
Question    one question about a video
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from PIL import Image
from tqdm import tqdm

from ..files import whole_file
from ..text.parts import shown
from .items import DataError, Places, Problem
from .readers.choices import FRAMES, SEED_FOLDER, SEED_FRAMES, SEED_OWNERS, SEED_VIDEOS
from .readers.files import Malformed, entries, list_of, number_of, text_of
from .video import BrokenVideo, DecodedVideo, IndexedVideo, Video

ACTION, PREDICTION, PROCEDURE = SEED_VIDEOS  # the whole video; a segment in seconds; a segment in frames
# Below the benchmark's folder, or that of all data: as the reference names them, or as owners do; `--help` shows them.
FOLDERS = {
    ACTION: ("SSV2/videos", "20bn-something-something-v2", "videos"),
    PREDICTION: ("EPIC-KITCHENS/3h91syskeag572hl6tvuovwv4d/videos/test", "EPIC-KITCHENS", "videos"),
    PROCEDURE: ("BreakfastII_15fps_qvga_sync", "videos"),
}
PLAIN = re.compile(r"\w[\w.-]*")  # an id that becomes a file's name, and no path
LISTED = 20  # problems that are shown to people; the JSON object has all
Opener: TypeAlias = "Callable[[Path, int], Video]"


@dataclass(frozen=True)
class Question:
    """One question about a video: `kind` is its dimension; the segment is 0, 0 where that is the whole video."""

    id: str
    kind: int
    video: str
    segment: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Cut:
    """What was done: of so many questions, those whose frames were cut now, were there before, or are not all there."""

    root: str
    folder: str
    questions: int
    cut: int
    there: int
    problems: tuple[Problem, ...]

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {**vars(self), "problems": [vars(problem) for problem in self.problems]}


def open_video(path: Path, kind: int) -> Video:
    """A video with its frames numbered as the reference's decoder for this dimension does. Raises BrokenVideo."""
    return DecodedVideo(path) if kind == PROCEDURE else IndexedVideo(path)


def cut(root: str | Path, *, opener: Opener = open_video, quiet: bool = False) -> Cut:
    """Cut the frames that are not there yet. Videos that are missing or broken are told, not raised.

    Raises DataError where SEED-Bench.json is missing or a frame cannot be written, QwenVLError without PyAV.
    """
    places = Places(root, SEED_FOLDER)
    file = places.file(SEED_OWNERS)
    if not file.is_file():
        raise DataError(f"there is no {file}: `qwenvl eval prepare seed_video {root}` says where it is published")
    folder = file.parent / SEED_FRAMES
    questions: list[Question] = []
    problems: list[Problem] = []
    for one in _questions(file):
        if isinstance(one, Problem):
            problems.append(one)
        else:
            questions.append(one)
    undone = [one for one in questions if not all(path.is_file() for path in _files(folder, one))]
    videos: dict[tuple[Path, int], list[Question]] = {}  # each is opened once, whatever the order of its questions
    for question in undone:
        path = video_of(question, places)
        if path is None:
            problems.append(Problem("missing video", question.id, f"there is no video {question.video}"))
        else:
            videos.setdefault((path, question.kind), []).append(question)
    done = len(questions) - len(undone)
    with tqdm(total=len(questions), initial=done, desc="frames", unit="question", disable=quiet or None) as bar:
        for (path, _), asked in videos.items():
            problems += _of_video(path, asked, folder, opener)
            bar.update(len(asked))
    total = len(questions) + sum(problem.kind == "malformed" for problem in problems)
    return Cut(str(root), str(folder), total, total - done - len(problems), done, tuple(problems))


def described(found: Cut) -> str:
    """What was done, for people."""
    lines = [
        f"SEED-Bench in {found.root}: {found.questions:,} questions about videos",
        f"  {found.cut:,} have frames in {found.folder} now, {found.there:,} had them before",
    ]
    lines += [f"  {count:,} x {kind}" for kind, count in Counter(one.kind for one in found.problems).items()]
    lines += [f"    {problem}" for problem in found.problems[:LISTED]]
    if len(found.problems) > LISTED:
        lines.append(f"    and {len(found.problems) - LISTED:,} more, which --json lists")
    return "\n".join(lines)


def sampled(count: int, frames: int = FRAMES) -> list[int]:
    """Which of `count` frames in a row are taken: all, if there are fewer than `frames`.

    Else the way from the first to the last is cut into `frames` equal pieces. Their beginnings, rounded (halves to even
    numbers), are taken, all moved by half a piece, rounded down.
    """
    if count < frames:
        return list(range(count))
    way = count - 1
    return [way // (2 * frames) + round(way * k / frames) for k in range(frames)]


def wanted(question: Question, video: Video) -> list[int]:
    """The numbers of the frames that a question takes of its video; fewer than four where the segment has fewer."""
    if question.kind == ACTION:
        return sampled(video.length - 1)  # the reference leaves the last frame out
    begin, end = question.segment
    if question.kind == PREDICTION:
        begin, end = (min(max(second * video.rate, 0), video.length - 1) for second in (begin, end))
    else:
        end = min(end, video.length)
    return [int(begin) + place for place in sampled(int(end) - int(begin))]


def video_of(question: Question, places: Places) -> Path | None:
    """The first file that is there: in FOLDERS or outside them, by its whole name or by its last part."""
    whole = PurePosixPath(question.video)
    names = [question.video]
    if question.kind == PREDICTION:  # as the owners' script for downloads puts it
        names.append(str(whole.parent / "videos" / whole.name))
    if question.kind != PROCEDURE:  # whose cameras' files have the same name
        names.append(whole.name)
    found = (places.picture(name, FOLDERS[question.kind]) for name in names)
    return next((path for path in found if os.path.isfile(path)), None)


def _questions(path: Path) -> Iterator[Question | Problem]:
    """Those about videos. What is wrong with others is not ours to tell."""
    for where, entry in entries(path, "questions"):
        kind = entry.get("question_type_id") if isinstance(entry, dict) else None
        if kind is None or kind not in SEED_VIDEOS:
            continue
        try:
            yield _question(entry, int(kind))
        except Malformed as error:
            yield Problem("malformed", f"{where} ({shown(entry.get('question_id'))})", str(error))


def _question(entry: Mapping[str, Any], kind: int) -> Question:
    name, video = text_of(entry, "question_id"), text_of(entry, "data_id")
    if not PLAIN.fullmatch(name):
        raise Malformed(f"question_id should be fit for a file's name, which {shown(name)} is not")
    if kind == ACTION:
        return Question(name, kind, video)
    segment = list_of(entry, "segment")
    if len(segment) != 2:
        raise Malformed(f"segment should be a beginning and an end, not {shown(segment)}")
    begin, end = (number_of({"segment": one}, "segment") for one in segment)
    if not 0 <= begin <= end:
        raise Malformed(f"segment should begin at 0 or later and end after that, not be {shown(segment)}")
    return Question(name, kind, video, (begin, end))


def _files(folder: Path, question: Question) -> list[Path]:
    return [folder / f"{question.id}_{k}.jpg" for k in range(FRAMES)]


def _of_video(path: Path, asked: Sequence[Question], folder: Path, opener: Opener) -> Iterator[Problem]:
    """Cut the frames of all questions about a video, which are of one dimension; yield what is wrong."""
    try:
        video = opener(path, asked[0].kind)
    except BrokenVideo as error:
        yield from (Problem("broken video", question.id, f"{path}: {error}") for question in asked)
        return
    for question in asked:
        numbers = wanted(question, video)
        missing = {
            file: number for file, number in zip(_files(folder, question), numbers, strict=False) if not file.is_file()
        }
        try:
            for file, picture in zip(missing, video.frames(list(missing.values())), strict=True):
                _write(file, picture)
        except BrokenVideo as error:
            yield Problem("broken video", question.id, f"{path}: {error}")
            continue
        if len(numbers) < FRAMES:
            what = f"{path}: there are {len(numbers)} frames to take, and questions are asked with {FRAMES}"
            yield Problem("short video", question.id, what)


def _write(path: Path, picture: Image.Image) -> None:
    """As JPEG of Pillow's own quality (75, with colours at half the size), which is the reference's."""
    try:
        path.parent.mkdir(exist_ok=True)
        with whole_file(path) as file:
            picture.save(file, format="JPEG")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from None
