"""Regions in replies: read whatever can be read, never raise, never slow down."""

import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwenvl.errors import PromptError
from qwenvl.text.boxes import Box, Region, boxes_in, parse_spans, points_text, strip_tags, to_thousandths

DOG = ((1.0, 2.0), (3.0, 4.0))
CAT = ((5.0, 6.0), (7.0, 8.0))

soup = st.lists(
    st.sampled_from(
        [
            "<ref>",
            "</ref>",
            "<box>",
            "</box>",
            "<quad>",
            "</quad>",
            "<img>",
            "<bo",
            "(1,2)",
            "(1,",
            "(3.5 , -4)",
            ",",
            "(",
        ]
    )
    | st.text(max_size=5)
).map("".join)


def test_labels_and_boxes_are_the_references(cases: dict[str, Any]) -> None:
    """The goldens' boxes and their phrases, and where the reference raises on a malformed reply, ours does not.

    Deliberate difference 3: malformed tags never raise.
    """
    for row in cases["to_list_format"]:
        found = [
            {"box": [int(v) for point in region.points for v in point]}
            | ({"ref": region.label} if region.label else {})
            for region in parse_spans(row["text"])
            if region.kind == "box"
        ]
        assert found == ([] if "error" in row["boxes"] else row["boxes"]), row["text"]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("<ref>dog</ref><box>(1,2),(3,4)(5,6),(7,8)</box>", [("dog", DOG), ("dog", CAT)]),
        ("<ref> dog </ref> \n<box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>", [("dog", DOG), ("dog", CAT)]),
        ("<ref>dog</ref><box>(1,2),(3,4)</box>, <box>(5,6),(7,8)</box>", [("dog", DOG), (None, CAT)]),
        ("<ref>dog</ref> is <box>(1,2),(3,4)</box>", [(None, DOG)]),
        ("<ref></ref><box>(1,2),(3,4)</box>", [(None, DOG)]),
        ("<ref>dog<box>(1,2),(3,4)</box>", [("dog", DOG)]),
        ("<ref>a<ref>dog</ref><box>(1,2),(3,4)</box>", [("dog", DOG)]),
        ("<box>( 1.0 , 2. ), (3 ,4.00)</box>", [(None, DOG)]),
        ("<box>（１，２），（3,4）</box>", [(None, DOG)]),
        ("<box>(3,4),(1,2)</box><box>(7,6),(5,8)</box>", [(None, DOG), (None, CAT)]),
        ("<box>(-5,2.5),(1001,99999999999999999999)</box>", [(None, ((0.0, 2.5), (1000.0, 1000.0)))]),
        ("<box>(1,2),(3,4)", [(None, DOG)]),
        ("<box>(1,2),(3,4),(5,6),(7,", [(None, DOG)]),
        ("<box>(1,2),(3,4", []),
        ("<box>(1,2),(3", []),
        ("<box>(1,2),(nan,inf)</box><box></box><box>", []),
        ("(1,2),(3,4)", []),
        ("<box>(1,2),(3,4)<box>(5,6),(7,8)</quad>", [(None, DOG), (None, CAT)]),
    ],
)
def test_tolerant_reading(reply: str, expected: list[tuple[str | None, Any]]) -> None:
    """Several boxes, decimals, spaces, swapped corners, numbers off the scale, cut-off and broken tags."""
    assert parse_spans(reply) == [Region(label, points, "box") for label, points in expected]


def test_quads() -> None:
    """A quad keeps its four corners in order, in thousandths and in pixels; as a box it is the box around them."""
    reply = "<ref>sign</ref><quad>(500,0),(1000,500),(500,1000),(0,500)</quad><quad>(1,2),(3,4),(5,6)</quad>"
    (quad,) = parse_spans(reply)
    assert quad == Region("sign", ((500, 0), (1000, 500), (500, 1000), (0, 500)), "quad")
    assert quad.pixels(200, 100) == ((100, 0), (200, 50), (100, 100), (0, 50))
    assert boxes_in(reply, 200, 100) == [Box(0, 0, 200, 100, "sign")]


def test_pixels_are_thousandths_of_the_picture() -> None:
    """A thousandth is of the width for x and of the height for y, as the reference draws."""
    assert boxes_in("<ref>dog</ref><box>(500,250),(1000,750)</box>", 640, 480) == [Box(320, 120, 640, 360, "dog")]


@given(reply=soup)
def test_never_raises(reply: str) -> None:
    """Whatever a model writes, regions are well-formed and on the scale."""
    for region in parse_spans(reply):
        assert len(region.points) == {"box": 2, "quad": 4}[region.kind]
        assert all(0 <= v <= 1000 for point in region.points for v in point)
    strip_tags(reply)
    assert all(b.x1 <= b.x2 <= 30 and b.y1 <= b.y2 <= 40 for b in boxes_in(reply, 30, 40))


thousandths = st.integers(0, 1000)


@given(
    corners=st.tuples(thousandths, thousandths, thousandths, thousandths),
    width=st.integers(1, 10**5),
    height=st.integers(1, 10**5),
)
@example(corners=(0, 0, 1000, 1000), width=1, height=1)
def test_round_trip(corners: tuple[int, int, int, int], width: int, height: int) -> None:
    """What the model wrote comes back from pixels, in a picture of any size."""
    x1, y1, x2, y2 = min(corners[0], corners[2]), min(corners[1::2]), max(corners[0], corners[2]), max(corners[1::2])
    (box,) = boxes_in(f"<box>{points_text((x1, y1, x2, y2))}</box>", width, height)
    assert to_thousandths(box, width, height) == (x1, y1, x2, y2)


def test_to_thousandths_clamps_and_refuses() -> None:
    """A box that leaves its picture is cut; one that is no box, or in a picture of no size, is an error."""
    assert to_thousandths(Box(-5, 10, 320, 1000), 640, 480) == (0, 21, 500, 1000)
    for box, width in ((Box(0, 0, float("nan"), 1), 640), (Box(0, 0, 1, 1), 0)):
        with pytest.raises(PromptError, match="cannot hold the box"):
            to_thousandths(box, width, 480)


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (
            "<ref> Woman</ref><box>(451,379),(731,806)</box> and"
            "<ref> her dog</ref><box>(219,424),(576,896)</box> playing",
            "Woman and her dog playing",
        ),
        ("<quad>(1,2),(3,4),(5,6),(7,8)</quad> text", "text"),
        ("the dog<box>(1,2),(3,", "the dog"),
        ("the dog<box>(1,2),(3,4) runs", "the dog runs"),
        ("<box>nonsense</box>so (it) goes", "so (it) goes"),
        ("no tags, 1 < 2", "no tags, 1 < 2"),
        ("<ref>unclosed", "unclosed"),
        ("<box>", ""),
    ],
)
def test_strip_tags(reply: str, text: str) -> None:
    """A reply reads like a sentence, without tags and coordinates; words are never lost to a tag that is not closed."""
    assert strip_tags(reply) == text


@pytest.mark.parametrize(
    "unit", ["<box>", "<ref>", "(", "(1", "(1,", "1", " ", "( ", "(1 ,", "<box>(1,2)", "<", "-", ".", "</box><ref>"]
)
def test_long_garbage_takes_linear_time(unit: str) -> None:
    """No unit of garbage, repeated, makes the readers backtrack over and over."""
    garbage = "<box>(" + unit * (300_000 // len(unit))
    began = time.monotonic()
    parse_spans(garbage)
    strip_tags(garbage)
    assert time.monotonic() - began < 3
