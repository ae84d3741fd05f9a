"""Frames of SEED-Bench's videos: which are taken, written and kept; what is wrong with a video stops no other."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from benchmark_data import DATA, form
from commands import Run
from PIL import Image

from qwenvl.evaluation.command import PLACES
from qwenvl.evaluation.frames import FOLDERS, Cut, Question, cut, described, open_video, sampled, video_of, wanted
from qwenvl.evaluation.items import DataError, Places
from qwenvl.evaluation.video import BrokenVideo

pytest_plugins = ("command_fixtures",)
SEED = "SEED-Bench.json"
VIDEOS = {  # where the reference has those of the small data
    "v0": "SSV2/videos/1.webm",
    "v1": "SSV2/videos/2.webm",
    "v2": "EPIC-KITCHENS/3h91syskeag572hl6tvuovwv4d/videos/test/P01_1.MP4",
    "v3": "BreakfastII_15fps_qvga_sync/P02/cam01/x.avi",
    "v4": "BreakfastII_15fps_qvga_sync/P02/cam01/y.avi",
}
decoded = pytest.mark.skipif(find_spec("av") is None, reason="PyAV is not installed: pip install 'qwenvl[video]'")


@dataclass
class Pretended:
    """A video whose frames show their numbers as greys; after `ends` of them it is broken."""

    length: int = 200
    rate: float = 10.0
    ends: int = 1000
    asked: list[list[int]] = field(default_factory=list)

    def frames(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """Greys."""
        self.asked.append(list(numbers))
        for number in numbers:
            if number >= self.ends:
                raise BrokenVideo("it ends")
            yield Image.new("RGB", (16, 8), (number,) * 3)


class Opener:
    """Pretended videos by the names of files, and which were opened, as which dimension."""

    def __init__(self, **videos: Pretended) -> None:
        self.videos, self.opened = videos, list[tuple[str, int]]()

    def __call__(self, path: Path, kind: int) -> Pretended:
        """A video, where the file is not empty."""
        self.opened.append((path.name, kind))
        if not path.read_bytes():
            raise BrokenVideo("it is empty")
        return self.videos.setdefault(path.stem, Pretended())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The small data's questions with a file for each video, and no frames."""
    folder = tmp_path / "seed_bench"
    folder.mkdir()
    shutil.copy(DATA / "seed_bench" / SEED, folder)
    for name in VIDEOS.values():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"video")
    return tmp_path


def changed(data: Path, **questions: dict[str, Any]) -> None:
    """Give questions other fields."""
    path = data / "seed_bench" / SEED
    whole = json.loads(path.read_bytes())
    for entry in whole["questions"]:
        entry |= questions.get(entry["question_id"], {})
    path.write_text(json.dumps(whole))


def frame(data: Path, name: str) -> Path:
    """A frame's file."""
    return data / "seed_bench" / "video_imgs_4" / f"{name}.jpg"


def told(found: Cut) -> list[tuple[str, str]]:
    """What is wrong with which question."""
    return [(problem.kind, problem.where) for problem in found.problems]


@pytest.mark.parametrize(
    ("count", "taken"),
    [
        (-1, []),
        (0, []),
        (1, [0]),
        (3, [0, 1, 2]),
        (4, [0, 1, 2, 2]),  # pieces of 0.75: 0, 0.75, 1.5, 2.25, moved by 0
        (5, [0, 1, 2, 3]),
        (7, [0, 2, 3, 4]),  # pieces of 1.5: 0, 1.5, 3, 4.5, halves to even numbers, moved by 0
        (9, [1, 3, 5, 7]),
        (11, [1, 3, 6, 9]),  # pieces of 2.5: 0, 2.5, 5, 7.5, moved by 1
        (41, [5, 15, 25, 35]),
        (149, [18, 55, 92, 129]),  # pieces of 37, moved by 18.5, rounded down
    ],
)
def test_which_frames_are_sampled(count: int, taken: list[int]) -> None:
    """Worked out by hand: all frames where there are fewer than four, else evenly, as the reference rounds."""
    assert sampled(count) == taken


def test_other_numbers_of_frames() -> None:
    """Eight of 17: pieces of 2, moved by 1."""
    assert sampled(17, 8) == [1, 3, 5, 7, 9, 11, 13, 15]


@pytest.mark.parametrize(
    ("kind", "segment", "length", "taken"),
    [
        (10, (0, 0), 42, [5, 15, 25, 35]),  # of 41: without the last
        (10, (0, 0), 4, [0, 1, 2]),
        (11, (3.0, 7.1), 200, [35, 45, 55, 65]),  # frames 30 to 71 at 10 a second
        (11, (3.05, 7.19), 200, [35, 45, 55, 65]),
        (11, (18.0, 30.0), 190, [181, 183, 185, 187]),  # 180 to 189, the last there is
        (11, (30.0, 40.0), 200, []),
        (12, (18, 167), 500, [36, 73, 110, 147]),
        (12, (18, 600), 167, [36, 73, 110, 147]),
        (12, (18, 20), 500, [18, 19]),
        (12, (18, 20), 10, []),
    ],
)
def test_segments(kind: int, segment: tuple[float, float], length: int, taken: list[int]) -> None:
    """The whole video without its last frame, seconds, or numbers of frames; all end where the video ends."""
    assert wanted(Question("v", kind, "v", segment), Pretended(length)) == taken


def test_frames_are_cut_once(data: Path) -> None:
    """Four JPEGs for each question, which the benchmark finds; a second run opens no video."""
    opener = Opener()
    found = cut(data, opener=opener, quiet=True)
    assert (found.questions, found.cut, found.there, found.problems) == (5, 5, 0, ())
    assert opener.opened == [("1.webm", 10), ("2.webm", 10), ("P01_1.MP4", 11), ("x.avi", 12), ("y.avi", 12)]
    assert opener.videos["x"].asked == [[18 + 18, 18 + 55, 18 + 92, 18 + 128]]  # of 148: pieces of 36.75
    read = form("seed_video", SEED, data)
    assert not read.problems
    assert [item.id for item in read.items] == ["v0", "v1", "v2", "v3", "v4"]
    assert read.items[3].pictures == tuple(frame(data, f"v3_{k}") for k in range(4))
    with Image.open(frame(data, "v3_2")) as picture:
        assert (picture.format, picture.size) == ("JPEG", (16, 8))
        assert picture.getpixel((3, 3)) == (110, 110, 110)
    again = cut(data, opener=opener, quiet=True)
    assert (again.cut, again.there, again.problems) == (0, 5, ())
    assert len(opener.opened) == 5


def test_a_stopped_run_goes_on(data: Path) -> None:
    """Only what is missing is cut; frames that are there stay as they are; a frame is whole or not there."""

    class Stopped(Pretended):
        def frames(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
            yield from super().frames(numbers[:2])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut(data, opener=Opener(x=Stopped()), quiet=True)
    assert sorted(path.name for path in frame(data, "v3_0").parent.glob("v[34]*")) == ["v3_0.jpg", "v3_1.jpg"]
    frame(data, "v3_1").write_bytes(b"mine")
    opener = Opener()
    found = cut(data, opener=opener, quiet=True)
    assert (found.cut, found.there) == (2, 3)
    assert opener.videos["x"].asked == [[110, 146]]
    assert frame(data, "v3_1").read_bytes() == b"mine"


def test_half_a_frame_is_not_left(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full in the middle of a frame is one clear error, and leaves no file."""

    def fails(_self: Image.Image, file: Any, **_options: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(DataError, match=r"cannot write .*v0_0\.jpg: No space left"):
        cut(data, opener=Opener(), quiet=True)
    assert list(frame(data, "v0_0").parent.iterdir()) == []


def test_missing_broken_and_short_videos(data: Path) -> None:
    """Each is told with its question, and does not stop the others; short ones have the frames that there are."""
    folder = data / "seed_bench"
    (folder / VIDEOS["v0"]).unlink()
    (folder / VIDEOS["v2"]).write_bytes(b"")
    found = cut(data, opener=Opener(**{"2": Pretended(3), "x": Pretended(ends=80)}), quiet=True)
    assert told(found) == [
        ("missing video", "v0"),
        ("short video", "v1"),
        ("broken video", "v2"),
        ("broken video", "v3"),
    ]
    assert (found.questions, found.cut, found.there) == (5, 1, 0)
    assert str(found.problems[0]) == "v0: there is no video 1.webm"
    assert str(found.problems[3]).endswith("x.avi: it ends")
    assert sorted(path.name for path in frame(data, "v").parent.glob("v[0123]_*")) == [
        "v1_0.jpg",
        "v1_1.jpg",
        "v3_0.jpg",
        "v3_1.jpg",
    ]
    lines = described(found).splitlines()
    assert lines[0] == f"SEED-Bench in {data}: 5 questions about videos"
    assert "  2 x broken video" in lines
    read = form("seed_video", SEED, data)
    assert [item.id for item in read.items] == ["v4"]
    assert [problem.where for problem in read.problems] == ["v0", "v1", "v2", "v3"]


def test_a_video_is_opened_once(data: Path) -> None:
    """However many questions it has, and wherever they stand: an hour of video takes long to index."""
    changed(data, v4={"data_id": "P02/cam01/x.avi"}, v0={"data_id": "2.webm"})
    opener = Opener()
    assert cut(data, opener=opener, quiet=True).cut == 5
    assert opener.opened == [("2.webm", 10), ("P01_1.MP4", 11), ("x.avi", 12)]
    assert len(opener.videos["x"].asked) == 2


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"question_id": "../v2"}, "fit for a file's name"),
        ({"question_id": ".v2"}, "fit for a file's name"),
        ({"data_id": None}, "data_id should be a text"),
        ({"segment": None}, "segment should be a list"),
        ({"segment": [1.0]}, "a beginning and an end"),
        ({"segment": [1.0, "2"]}, "segment should be a number"),
        ({"segment": [2.0, 1.0]}, "segment should begin"),
        ({"segment": [-1.0, 1.0]}, "segment should begin"),
    ],
)
def test_malformed_questions(fields: dict[str, Any], says: str, data: Path) -> None:
    """Told with their place; nothing is written outside the folder."""
    changed(data, v2=fields)
    found = cut(data, opener=Opener(), quiet=True)
    (problem,) = found.problems
    assert (problem.kind, found.questions, found.cut) == ("malformed", 5, 4)
    assert problem.where.startswith("SEED-Bench.json questions 8 (")
    assert says in problem.what
    assert len(list(data.rglob("*.jpg"))) == 16


def test_where_videos_lie(tmp_path: Path) -> None:
    """In the reference's folders, the owners', `videos` or none; Breakfast's by the whole name, which cameras share."""
    places = Places(tmp_path, "seed_bench")
    epic, breakfast = Question("v", 11, "P03/P03_24.MP4"), Question("v", 12, "P06/cam01/P06_milk.avi")
    for question, name in [
        (epic, "P03_24.MP4"),
        (epic, "seed_bench/videos/P03_24.MP4"),
        (epic, "seed_bench/EPIC-KITCHENS/P03/videos/P03_24.MP4"),
        (epic, "EPIC-KITCHENS/P03/P03_24.MP4"),
        (Question("v", 10, "94328.webm"), "seed_bench/20bn-something-something-v2/94328.webm"),
        (breakfast, "seed_bench/P06/cam01/P06_milk.avi"),
        (breakfast, "seed_bench/BreakfastII_15fps_qvga_sync/P06/cam01/P06_milk.avi"),
    ]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert video_of(question, places) is None
        path.touch()
        assert video_of(question, places) == path
        path.unlink()
    (tmp_path / "P06_milk.avi").touch()
    assert video_of(breakfast, places) is None
    assert set(re.findall(r"[\w/-]+", PLACES)) >= {folder for folders in FOLDERS.values() for folder in folders}


def test_the_command(run: Run, data: Path) -> None:
    """Status 1 and a list where something is missing, 0 where all is there, one line where there is no benchmark."""
    for name in VIDEOS.values():
        (data / "seed_bench" / name).unlink()
    status, out, err = run("eval", "frames", str(data), "--quiet")
    assert (status, err) == (1, "")
    assert "  5 x missing video\n    v0: there is no video 1.webm\n" in out
    status, out, _ = run("eval", "frames", str(data), "--json", "--quiet")
    assert status == 1
    assert json.loads(out)["problems"][4]["what"] == "there is no video P02/cam01/y.avi"
    shutil.copytree(DATA / "seed_bench" / "video_imgs_4", data / "seed_bench" / "video_imgs_4")
    status, out, _ = run("eval", "frames", str(data), "--quiet")
    assert status == 0
    assert "0 have frames in" in out
    assert "now, 5 had them before" in out
    status, out, err = run("eval", "frames", str(data / "nowhere"))
    assert (status, out) == (2, "")
    assert err.startswith("error: there is no ")
    assert "SEED-Bench.json: `qwenvl eval prepare seed_video " in err
    status, out, _ = run("eval", "frames", "--help")
    assert status == 0
    assert PLACES in out


def test_without_av(run: Run, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what to install."""
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    status, out, err = run("eval", "frames", str(data), "--quiet")
    assert (status, out) == (2, "")
    assert err == "error: videos are decoded with PyAV: pip install 'qwenvl[video]'\n"


def encoded(path: Path, count: int, codec: str, rate: int = 15, pauses: bool = False) -> None:
    """A video in which frame n is grey of 2 * n, all through; with `pauses` each fifth frame is shown for longer."""
    import av

    with av.open(str(path), "w", format={".MP4": "mp4"}.get(path.suffix)) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.gop_size, stream.bit_rate = 12, 2_000_000
        for number in range(count):
            picture = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (2 * number,) * 3))
            picture.pts = number + (number // 5 if pauses else 0)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def greys(pictures: Sequence[Path | Image.Image]) -> list[float]:
    """The numbers of frames, as their greys say."""
    opened = [Image.open(one) if isinstance(one, Path) else one for one in pictures]
    return [one.convert("L").getpixel((20, 20)) / 2 for one in opened]


@decoded
@pytest.mark.parametrize("pauses", [False, True])
@pytest.mark.parametrize(
    ("name", "codec", "kind"),
    [
        ("a.webm", "libvpx-vp9", 10),
        ("a.MP4", "libx264", 11),
        ("a.MP4", "mpeg4", 11),
        ("a.ts", "libx264", 11),
        ("a.avi", "mpeg4", 12),
    ],
)
def test_every_frame_of_a_real_video(name: str, codec: str, kind: int, pauses: bool, tmp_path: Path) -> None:
    """By its number, from whichever key frame, also where frames are shown for different times.

    A transport stream has no index: a seek to its first frames lands behind them, and gave frame 12 for frame 0.
    """
    encoded(tmp_path / name, 60, codec, pauses=pauses and kind != 12)
    video = open_video(tmp_path / name, kind)
    assert video.length == 60
    assert pauses or video.rate == pytest.approx(15)
    for numbers in (list(range(60)), [0, 0, 11, 12, 12, 59], [50], []):
        assert greys(list(video.frames(numbers))) == pytest.approx(numbers, abs=0.9), numbers


@decoded
def test_colours_are_read_as_the_video_says(tmp_path: Path) -> None:
    """High definition has other colours than the rest (BT.709): PyAV before 17 read such a red as (232, 0, 1)."""
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=15)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.colorspace = 1
        picture = av.VideoFrame(64, 48, "yuv420p")
        for plane, value in zip(picture.planes, (63, 102, 240), strict=True):  # red in BT.709
            plane.update(bytes([value]) * plane.buffer_size)
        container.mux(stream.encode(picture))
        container.mux(stream.encode())
    (image,) = open_video(tmp_path / "a.mp4", 11).frames([0])
    assert image.getpixel((20, 20)) == pytest.approx((255, 0, 0), abs=4)


@decoded
def test_a_video_that_ends_early(tmp_path: Path) -> None:
    """Where there are fewer frames than there were, the video is broken: no loop, and no wrong frame."""
    encoded(tmp_path / "a.avi", 100, "mpeg4")
    video = open_video(tmp_path / "a.avi", 12)
    indexed = open_video(tmp_path / "a.avi", 11)
    encoded(tmp_path / "a.avi", 50, "mpeg4")
    for one in (video, indexed):
        with pytest.raises(BrokenVideo, match="it ends before frame 70 of 100"):
            list(one.frames([10, 70]))


@decoded
def test_a_video_without_time_stamps(tmp_path: Path) -> None:
    """Breakfast's are numbered as they are decoded, as in the reference, and need none; others are told."""
    encoded(tmp_path / "a.h264", 20, "libx264")
    video = open_video(tmp_path / "a.h264", 12)
    assert video.length == 20
    assert greys(list(video.frames([3, 19]))) == pytest.approx([3, 19], abs=0.9)
    with pytest.raises(BrokenVideo, match="no frame with a time stamp"):
        open_video(tmp_path / "a.h264", 11)


@decoded
def test_real_videos_from_file_to_question(run: Run, data: Path) -> None:
    """Videos encoded here become the pictures of questions, of the right frames; a broken one is told."""
    folder = data / "seed_bench"
    encoded(folder / VIDEOS["v0"], 42, "libvpx-vp9")
    encoded(folder / VIDEOS["v2"], 120, "libx264", rate=10)
    encoded(folder / VIDEOS["v3"], 60, "mpeg4")
    encoded(folder / VIDEOS["v4"], 60, "mpeg4")
    whole = (folder / VIDEOS["v4"]).read_bytes()
    (folder / VIDEOS["v4"]).write_bytes(whole[:300])
    status, out, err = run("eval", "frames", str(data), "--quiet", "--json")
    assert (status, err) == (1, "")
    found = json.loads(out)
    assert [(one["kind"], one["where"]) for one in found["problems"]] == [
        ("broken video", "v1"),
        ("broken video", "v4"),
    ]
    assert found["problems"][0]["what"].endswith("2.webm: Invalid data found when processing input")
    read = form("seed_video", SEED, data)
    assert [item.id for item in read.items] == ["v0", "v2", "v3"]
    numbers = [greys([path for path in item.pictures if isinstance(path, Path)]) for item in read.items]
    assert numbers[0] == pytest.approx([5, 15, 25, 35], abs=0.9)
    assert numbers[1] == pytest.approx([38, 54, 70, 86], abs=0.9)  # 30 to 95: pieces of 16, moved by 8
    assert numbers[2] == pytest.approx([23, 33, 43, 54], abs=0.9)  # 18 to 60: pieces of 10.25, moved by 5
    (folder / VIDEOS["v1"]).unlink()
    encoded(folder / VIDEOS["v1"], 30, "libvpx-vp9")
    (folder / VIDEOS["v4"]).write_bytes(whole)
    assert run("eval", "frames", str(data), "--quiet")[0] == 0
    assert len(form("seed_video", SEED, data).items) == 5
