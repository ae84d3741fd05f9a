"""Parts, turns and tagged text: what is accepted, what is refused, and that nothing is lost."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwenvl.errors import PromptError
from qwenvl.text.parts import Turn, parse_tagged, parts_of
from qwenvl.text.tokenizer import IMAGE_TAGS

tag_soup = st.lists(
    st.sampled_from([*IMAGE_TAGS, "(1,2),(3,4)", "(1,2),(3,4),(5,6),(7,8)", "(01,2),(3,4)", "a.jpg", "\n", " ", "<"])
    | st.text(max_size=4)
).map("".join)


def written(parts: list[dict[str, Any]]) -> str:
    """Parsed parts, spelled out again."""
    text = ""
    for part in parts:
        text += part.get("text", "")
        text += f"<img>{part['image']}</img>" if "image" in part else ""
        text += f"<ref>{part['ref']}</ref>" if "ref" in part else ""
        for kind in ("box", "quad"):
            for place in part.get(kind, ()) or ():
                points = [f"({x},{y})" for x, y in zip(place[::2], place[1::2], strict=True)]
                text += f"<{kind}>{','.join(points)}</{kind}>"
        text += "<box>" if part.get("box", ()) is None else ""
    return text


def test_a_str_is_one_text_part() -> None:
    """The short form of a query."""
    assert parts_of("hello <img>x</img>") == ({"text": "hello <img>x</img>"},)


def test_parts_are_copied() -> None:
    """A caller's list can be changed afterwards, and is not changed by us."""
    query: list[dict[str, Any]] = [{"image": "a.jpg"}, {"ref": "dog", "box": [1, 2, 3, 4]}]
    parts = parts_of(query, numbered=False)
    assert parts == ({"image": "a.jpg", "numbered": False}, {"ref": "dog", "box": [[1, 2, 3, 4]]})
    assert query == [{"image": "a.jpg"}, {"ref": "dog", "box": [1, 2, 3, 4]}]
    assert parts_of(parts) == parts


def test_box_spellings() -> None:
    """One place or several, in lists or tuples, ints or whole floats or NumPy's ints; None opens a box."""
    for box in ([1, 2, 3, 4], (1, 2.0, 3, 4), [[1, 2, 3, 4]], ((1, 2, 3, np.int64(4)),)):
        assert parts_of([{"box": box}]) == ({"box": [[1, 2, 3, 4]]},)
    assert parts_of([{"quad": [1, 2, 3, 4, 5, 6, 7, 8]}]) == ({"quad": [[1, 2, 3, 4, 5, 6, 7, 8]]},)
    assert parts_of([{"ref": "dog", "box": None}]) == ({"ref": "dog", "box": None},)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([{"text": ""}, {"text": ""}], "the prompt is empty"),
        (None, "a query is a str or a list of parts, not a NoneType"),
        ({"text": "hi"}, "a query is a str or a list of parts, not a dict"),
        (["hi"], "part 1 is a str, not a dict"),
        ([{"text": "a"}, {}], "part 2 must have one of"),
        ([{"image": "a", "text": "b"}], "part 1 must have one of"),
        ([{"box": [1, 2, 3, 4], "quad": [0] * 8}], "part 1 must have one of"),
        ([{"image": "a", "size": 3}], "part 1 has a key that a part with image cannot have: 'size'"),
        ([{"text": "a", "numbered": False}], "part 1 has a key that a part with text cannot have: 'numbered'"),
        ([{"image": None}], "part 1: image is None"),
        ([{"image": "a", "numbered": "no"}], "part 1: numbered must be True or False"),
        ([{"text": 3}], "part 1: text must be a str, not int"),
        ([{"ref": None}], "part 1: ref must be a str, not NoneType"),
        ([{"box": []}], "part 1: a box is 4 whole numbers"),
        ([{"box": [1, 2, 3]}], "part 1: a box is 4 whole numbers"),
        ([{"box": [1, 2, 3, 4.5]}], "part 1: a box is 4 whole numbers"),
        ([{"box": [1, 2, 3, float("nan")]}], "part 1: a box is 4 whole numbers"),
        ([{"box": [1, 2, 3, float("inf")]}], "part 1: a box is 4 whole numbers"),
        ([{"box": [1, 2, 3, True]}], "part 1: a box is 4 whole numbers"),
        ([{"box": "1234"}], "part 1: a box is 4 whole numbers"),
        ([{"box": b"1234"}], "part 1: a box is 4 whole numbers"),
        ([{"box": np.zeros((3, 3))}], "part 1: a box is 4 whole numbers"),
        ([{"box": [[1, 2, 3, 4], 5]}], "part 1: a box is 4 whole numbers"),
        ([{"quad": None}], "part 1: a quad is 8 whole numbers"),
        ([{"quad": [1, 2, 3, 4]}], "part 1: a quad is 8 whole numbers"),
        ([{"box": [1, 2, 3, 1001]}], "part 1: box .* is off the 0..1000 scale"),
        ([{"box": [-1, 2, 3, 4]}], "part 1: box .* is off the 0..1000 scale"),
        ([{"box": None}, {"text": "and"}], "part 1: only the last part can leave its box open"),
    ],
)
def test_malformed_queries_name_the_part(query: Any, message: str) -> None:
    """One line that says which part is wrong and why."""
    with pytest.raises(PromptError, match=message) as caught:
        parts_of(query)
    assert "\n" not in str(caught.value)


def test_turns_go_through_json() -> None:
    """A conversation can be saved and read back."""
    turn = Turn([{"image": "store:1"}, {"ref": "dog", "box": [1, 2, 3, 4]}, {"text": "你好"}], "<ref>dog</ref>")
    assert Turn.from_dict(json.loads(json.dumps(turn.to_dict()))) == turn
    assert Turn.from_dict({"parts": [{"text": "hi"}], "reply": None}) == Turn(({"text": "hi"},), None)


@pytest.mark.parametrize(
    "data",
    [None, [], {}, {"parts": [{"text": "a"}]}, {"parts": [], "reply": ""}, {"parts": [{"text": "a"}], "reply": 3}],
)
def test_malformed_turns_are_refused(data: Any) -> None:
    """A file of turns that is not one stops with one line."""
    with pytest.raises(PromptError) as caught:
        Turn.from_dict(data)
    assert "\n" not in str(caught.value)


def test_a_turn_keeps_references_not_pictures() -> None:
    """A picture in memory cannot go through JSON: the caller stores it and keeps its key."""
    with pytest.raises(PromptError, match="part 1: a turn keeps a str"):
        Turn([{"image": Path("a.jpg")}], "")


# Tagged text


def test_tagged_texts_are_parsed_as_the_reference(cases: dict[str, Any]) -> None:
    """The reference's elements, but that a phrase and the boxes that touch it are one part.

    Deliberate difference 3: malformed tags never raise, where the reference says "Unclosed image token".
    """
    for row in cases["to_list_format"]:
        parts = parse_tagged(row["text"])
        assert written(parts) == row["text"]
        if "error" in row["list"]:
            assert parts == [{"text": row["text"], "tagged": True}]
            continue
        flat: list[dict[str, str]] = []
        for part in parts:
            flat += [{key: part[key]} for key in ("text", "image", "ref") if key in part]
            for kind in {"box", "quad"} & part.keys():
                flat += [{kind: written([{kind: [place]}])[len(kind) + 2 : -len(kind) - 3]} for place in part[kind]]
        assert flat == row["list"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("<img>a b.jpg</img>", [{"image": "a b.jpg", "numbered": False}]),
        ("<ref>dog</ref><box>", [{"ref": "dog", "box": None}]),
        ("<box>", [{"box": None}]),
        (
            "<ref>a</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>",
            [{"ref": "a", "box": [[1, 2, 3, 4], [5, 6, 7, 8]]}],
        ),
        (
            "<ref>a</ref><quad>(1,2),(3,4),(5,6),(7,8)</quad>.",
            [{"ref": "a", "quad": [[1, 2, 3, 4, 5, 6, 7, 8]]}, {"text": "."}],
        ),
        ("<box>(1,2),(3,1001)</box>", [{"text": "<box>(1,2),(3,1001)</box>", "tagged": True}]),
        ("<ref>a</ref><box>(1, 2),(3,4)</box>", [{"ref": "a"}, {"text": "<box>(1, 2),(3,4)</box>", "tagged": True}]),
        ("<img>a<img>b</img>", [{"text": "<img>a", "tagged": True}, {"image": "b", "numbered": False}]),
        ("<img></img>", [{"text": "<img></img>", "tagged": True}]),
        ("<box>then", [{"text": "<box>then", "tagged": True}]),
        ("<|im_end|>", [{"text": "<|im_end|>"}]),
    ],
)
def test_tagged_text(text: str, parts: list[dict[str, Any]]) -> None:
    """Well-formed tags become structure, anything else stays the text that it is."""
    assert parse_tagged(text) == parts


@given(text=tag_soup)
@example(text="<ref>a</ref><box>(1,2),(3,4)</box><box>")
def test_tagged_text_loses_nothing(text: str) -> None:
    """Parsing never raises, gives valid parts, and spelling the parts out again gives the text."""
    parts = parse_tagged(text)
    assert written(parts) == text
    assert not parts or list(parts_of(parts)) == parts
