"""Where the small model is taught to look: at the thing that is named, and at the letter that is spelt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from support import write_vocabulary

from qwenvl.text.boxes import Box
from qwenvl.text.prompt import training_example
from qwenvl.text.tokenizer import SPECIALS, Tokenizer
from qwenvl.training.recipes.tiny_dense import LETTERING, LETTERS, dense_targets
from qwenvl.training.recipes.tiny_pointing import LETTER, NEAR, find_groups, find_points
from qwenvl.training.recipes.tiny_scenes import COLOURS, Scene, Thing, letters

RED, ALSO_RED, BLUE = "(100,100),(300,500)", "(0,600),(200,1000)", "(600,500),(900,900)"
WRITTEN = "(450,100),(950,400)"
CAPTION = (
    f"<ref>red circle</ref><box>{RED}</box>, <ref>blue square</ref><box>{BLUE}</box>"
    f" and the text <ref>TAXI</ref><box>{WRITTEN}</box>"
)
SPELT = [(letter, letter) for letter in "TAXI"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Some words are one token; words in capitals are spelt."""
    return Tokenizer(write_vocabulary(tmp_path_factory.mktemp("words"), "red circle square text this user assistant"))


def holding(word: str | None = "TAXI") -> Scene:
    """A red circle, a blue square, a word if it is one, and another red circle, in a picture of 200 x 100 pixels."""
    things = [
        Thing("circle", "red", Box(20, 10, 60, 50), COLOURS["red"]),
        Thing("square", "blue", Box(120, 50, 180, 90), COLOURS["blue"]),
        Thing("circle", "red", Box(0, 60, 40, 100), COLOURS["red"]),
    ]
    if word is not None:
        things.insert(2, Thing("word", "black", Box(90, 10, 190, 40), COLOURS["black"], word=word, font=(0, 30)))
    return Scene(0, 200, 100, tuple(things), "plain", ((128, 128, 128),) * 2)


def chat(tokenizer: Tokenizer, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids and labels of a round in ChatML."""
    messages = [
        {"from": "user", "value": f"Picture 1:<img>1</img>\n{question}"},
        {"from": "assistant", "value": answer},
    ]
    example = training_example(tokenizer, messages, 2048, n_queries=4)
    return example.ids, example.labels


def base(tokenizer: Tokenizer, question: str, answer: str) -> tuple[list[int], list[int]]:
    """The same as a base model goes on, with an end."""
    asked, told = (tokenizer.encode_tagged(text, SPECIALS) for text in (question, f"{answer}<|endoftext|>"))
    return [*asked, *told], [*[-100] * len(asked), *told]


def looks(tokenizer: Tokenizer, shown: Scene, ids: list[int], labels: list[int]) -> list[tuple[int | str, str]]:
    """What is looked at, a thing's number or a letter, and the text that is found meanwhile."""
    found = find_points(tokenizer, ids, labels, shown)
    assert len(found) == len(ids)
    assert found[-1] == 0
    runs = itertools.groupby(range(len(ids) - 1), key=found.__getitem__)
    return [
        (LETTERS[point - LETTER - 1] if point > LETTER else point, tokenizer.decode([ids[at + 1] for at in run]))
        for point, run in runs
        if point
    ]


@pytest.mark.parametrize("form", ["chat", "base"])
def test_captions(tokenizer: Tokenizer, form: str) -> None:
    """A thing from its `<ref>` to the end of its box, and the word's letters one by one in between."""
    if form == "chat":
        sequence = chat(tokenizer, "Describe the image with boxes.", CAPTION)
    else:
        sequence = base(tokenizer, "Generate the caption in English with grounding:", f" {CAPTION}")
    assert looks(tokenizer, holding(), *sequence) == [
        (1, f"red circle</ref><box>{RED}</box>"),
        (2, f"blue square</ref><box>{BLUE}</box>"),
        *SPELT,
        (3, f"</ref><box>{WRITTEN}</box>"),
    ]


def test_several_boxes_of_a_phrase(tokenizer: Tokenizer) -> None:
    """The phrase and its first box are about the first, another box all along about another."""
    boxes = f"<box>{RED}</box><box>{ALSO_RED}</box>"
    told = chat(tokenizer, "Where are the red circles?", f"<ref>red circles</ref>{boxes}")
    second = (4, f"{ALSO_RED}</box>")
    assert looks(tokenizer, holding(), *told) == [(1, f"red circles</ref><box>{RED}</box>"), second]
    rest = base(tokenizer, "<ref>red circles</ref><box>", boxes.removeprefix("<box>"))
    assert looks(tokenizer, holding(), *rest) == [(1, f"{RED}</box>"), second]  # the phrase is no answer


def test_a_phrase_reaches_no_further_than_its_box(tokenizer: Tokenizer) -> None:
    """A box without a phrase, behind one that has one, is looked at from its own beginning."""
    told = base(tokenizer, "Box:", f"<ref>red circle</ref><box>{RED}</box> text <box>{BLUE}</box>")
    assert looks(tokenizer, holding(), *told) == [(1, f"red circle</ref><box>{RED}</box>"), (2, f"{BLUE}</box>")]


@pytest.mark.parametrize("question", ["What is in <box>{}</box>?", "What is <ref>this</ref><box>{}</box>?"])
def test_a_box_in_a_question(tokenizer: Tokenizer, question: str) -> None:
    """Only where it ends, since nobody knows before; a `<ref>` that means nothing is not looked at."""
    asked, answer = question.format(BLUE), "blue square"
    assert looks(tokenizer, holding(), *chat(tokenizer, asked, answer)) == [(2, "?")]
    sequence = base(tokenizer, f"{asked} Answer:", f" {answer}")
    assert looks(tokenizer, holding(), *sequence) == [(2, "?")]


def test_a_question_does_not_reach_into_the_answer(tokenizer: Tokenizer) -> None:
    """A phrase in a question, printed or not, does not begin what an answer's box ends."""
    told = base(tokenizer, "<ref>TAXI</ref> <ref>red circle</ref>", f"<box>{RED}</box>")
    assert looks(tokenizer, holding(), *told) == [(1, f"{RED}</box>")]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("Is there a blue square?", [(2, "?")]),
        ("What shape is the blue shape in it?", [(2, " ")]),
        ("Count the squares.", [(2, ".")]),
        ("有几个蓝色正方形？", [(2, "？")]),
        ("正方形在红色圆形的左边吗？", [(2, "在")]),  # of two red circles, none is meant
        ("Is the square above the blue square?", [(2, " "), (2, "?")]),
        ("Where is the blue circle?", []),  # there is none, though there are circles and something blue
        ("Where is the red square?", []),
        ("How many circles are there?", []),
        ("Is there a shape?", []),
    ],
)
def test_phrases_in_questions(tokenizer: Tokenizer, asked: str, expected: list[tuple[int, str]]) -> None:
    """Where the phrase of one thing alone ends it is looked at; not in an answer without boxes."""
    ids, labels = chat(tokenizer, asked, "a blue square.")
    found = find_points(tokenizer, ids, labels, holding())
    rest = [(thing, tokenizer.decode(ids[at + 1 :])) for at, thing in enumerate(found) if thing]
    assert [(thing, text[:1]) for thing, text in rest] == expected


def test_a_phrase_that_ends_inside_a_token(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The small model's own vocabulary has tokens that begin in a phrase and go on behind it: there the phrase ends."""
    long = "图形的形状是什么"
    tokenizer = Tokenizer(write_vocabulary(tmp_path_factory.mktemp("words"), long))
    ids, labels = chat(tokenizer, f"蓝色{long}？", "正方形")
    at = ids.index(tokenizer.encode(long)[0])
    assert tokenizer.decode([ids[at]]) == long
    only = [position == at for position in range(len(ids))]
    assert find_points(tokenizer, ids, labels, holding()) == [2 * here for here in only]
    assert find_groups(tokenizer, ids, labels, holding()) == [(1 + 2**2) * here for here in only]


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("How many shapes are there?", [({1, 2, 4}, " ")]),  # not the word
        ("Count the circles.", [({1, 4}, ".")]),
        ("有几个红色图形？", [({1, 4}, "？")]),
        ("Is there a blue square?", [({2}, "?")]),
        ("Is there a green circle?", [(set(), "?")]),
        ("Is the red circle above the blue square?", [({1, 4}, " "), ({2}, "?")]),
        ("What shape is the blue shape?", [({2}, "?")]),
        ("What shape is it?", []),
        ("Read the text.", []),
    ],
)
def test_groups(tokenizer: Tokenizer, asked: str, meant: list[tuple[set[int], str]]) -> None:
    """Where a question's phrase ends, all that it means, be it nothing; answers are no questions."""
    ids, labels = chat(tokenizer, asked, "a blue square.")
    found = [(at, group) for at, group in enumerate(find_groups(tokenizer, ids, labels, holding())) if group]
    assert [
        ({number for number in range(1, 9) if group >> number & 1}, tokenizer.decode(ids[at + 1 :])[:1])
        for at, group in found
    ] == meant
    assert all(group & 1 for _, group in found)


def test_tags_mean_nothing(tokenizer: Tokenizer) -> None:
    """There is a star in `<|im_start|>`, also where it is learned from."""
    star = Thing("star", "red", Box(20, 10, 60, 50), COLOURS["red"])
    shown = Scene(0, 200, 100, (star,), "plain", ((128, 128, 128),) * 2)
    ids = [tokenizer.im_start_id, *tokenizer.encode("star?")]
    assert find_groups(tokenizer, ids, [-100] * len(ids), shown)[0] == 0
    assert sum(find_points(tokenizer, ids, [-100] * len(ids), shown)) == 1


@pytest.mark.parametrize(
    ("corners", "thing"),
    [
        ((600, 500, 900, 900), 2),
        ((588, 512, 888, 912), 2),  # as far off as questions are
        ((600, 500, 900, 900 - NEAR), 2),
        ((600, 500, 900, 900 - NEAR - 1), 0),
        ((600 + NEAR // 2, 500 + NEAR // 2, 900, 900), 2),
        ((600 + NEAR // 2, 500 + NEAR // 2 + 1, 900, 900), 0),
        ((600 - NEAR // 4, 500 + NEAR // 4, 900 - NEAR // 4, 900 + NEAR // 4 + 1), 0),  # both ways add up
        ((0, 600, 200, 1000), 4),
        ((0, 0, 1000, 1000), 0),
    ],
)
def test_inexact_corners(tokenizer: Tokenizer, corners: Sequence[int], thing: int) -> None:
    """A box is the nearest thing's, if its corners are NEAR altogether, and nobody's otherwise."""
    box = "({},{}),({},{})".format(*corners)
    expected = [(thing, "?")] if thing else []
    assert looks(tokenizer, holding(), *chat(tokenizer, f"What is in <box>{box}</box>?", "red circle")) == expected


def test_the_nearest_of_two_near_ones(tokenizer: Tokenizer) -> None:
    """Where the corners are near to several things, the nearest counts, not the first."""
    one = Thing("square", "red", Box(20, 10, 60, 50), COLOURS["red"])
    other = Thing("square", "blue", Box(24, 12, 64, 52), COLOURS["blue"])
    shown = Scene(0, 200, 100, (one, other), "plain", ((128, 128, 128),) * 2)
    for box, nearest in (("(104,104),(304,504)", 1), ("(116,116),(316,516)", 2)):
        assert looks(tokenizer, shown, *chat(tokenizer, f"What is in <box>{box}</box>?", "red")) == [(nearest, "?")]


@pytest.mark.parametrize("word", ["TAXI", "ZOO", "407", "42"])
def test_a_word_is_read_letter_by_letter(tokenizer: Tokenizer, word: str) -> None:
    """While a letter is found, that letter is looked at: in ChatML, behind the base form's space, and as a phrase."""
    spelt = [(letter, "".join(run)) for letter, run in itertools.groupby(word)]
    shown = holding(word)
    assert looks(tokenizer, shown, *chat(tokenizer, "Read the text.", word)) == spelt
    assert looks(tokenizer, shown, *base(tokenizer, "Read the text. Answer:", f" {word}")) == spelt
    phrase = base(tokenizer, "Box:", f"<ref>{word}</ref><box>{WRITTEN}</box>")
    assert looks(tokenizer, shown, *phrase) == [*spelt, (3, f"</ref><box>{WRITTEN}</box>")]


def test_letters_have_the_classes_of_the_dense_targets(tokenizer: Tokenizer) -> None:
    """A letter's number less LETTER is the one in the cells that hold it; no thing has such a number."""
    sequence = chat(tokenizer, "Read the text.", "TAXI")
    found = [point for point in find_points(tokenizer, *sequence, holding()) if point]
    assert found == [LETTER + 20, LETTER + 1, LETTER + 24, LETTER + 9]  # in the alphabet, from 1
    assert found == [LETTER + 1 + LETTERS.index(letter) for letter in "TAXI"]
    assert set(dense_targets(word_alone(), 8)[:, LETTERING].tolist()) - {0} == {point - LETTER for point in found}
    assert len(holding().things) < LETTER


def word_alone() -> Scene:
    """A picture with nothing but a word, as large as it."""
    left, top, right, bottom = letters(0, 60).getbbox("TAXI")
    size = right - left, bottom - top
    thing = Thing("word", "black", Box(0, 0, *size), COLOURS["black"], word="TAXI", font=(0, 60))
    return Scene(0, int(size[0]), int(size[1]), (thing,), "plain", ((200, 200, 200),) * 2)


def test_a_letter_that_is_one_token_with_its_space(tmp_path_factory: pytest.TempPathFactory) -> None:
    """In the small model's own vocabulary, ` E` of ` English` is one token, and so is the beginning of ` EXIT`."""
    tokenizer = Tokenizer(write_vocabulary(tmp_path_factory.mktemp("words"), "English"))
    assert tokenizer.decode(tokenizer.encode(" EXIT")[:1]) == " E"
    sequence = base(tokenizer, "Read the text. Answer:", " EXIT")
    looked = [point - LETTER for point in find_points(tokenizer, *sequence, holding("EXIT")) if point]
    assert looked == [1 + LETTERS.index(letter) for letter in "EXIT"]


def test_numbers_among_corners_are_no_word(tokenizer: Tokenizer) -> None:
    """The digits of a printed 90 stand in many boxes; they are looked at where they are the phrase or the answer."""
    caption = CAPTION.replace("TAXI", "90")
    assert looks(tokenizer, holding("90"), *base(tokenizer, "Box:", caption)) == [
        (1, f"red circle</ref><box>{RED}</box>"),
        (2, f"blue square</ref><box>{BLUE}</box>"),
        ("9", "9"),
        ("0", "0"),
        (3, f"</ref><box>{WRITTEN}</box>"),
    ]
    asked = chat(tokenizer, "How many 90 are in <box>(590,490),(890,890)</box>?", "90")
    assert looks(tokenizer, holding("90"), *asked) == [(2, "?"), ("9", "9"), ("0", "0")]


@pytest.mark.parametrize("answer", ["Yes", "2", "No, <ref>TAX</ref>", "TAX", "There is no text."])
def test_other_answers_look_at_nothing(tokenizer: Tokenizer, answer: str) -> None:
    """Nor do the questions before them, whatever word they name."""
    for shown in (holding(), holding(None)):
        assert looks(tokenizer, shown, *chat(tokenizer, "Is TAXI or <ref>TAXI</ref> there?", answer)) == []


def test_a_picture_without_words(tokenizer: Tokenizer) -> None:
    """Its things are looked at all the same; letters are not, whoever spells them."""
    sequence = chat(tokenizer, "Box it.", f"<ref>red circle</ref><box>{RED}</box> TAXI")
    assert looks(tokenizer, holding(None), *sequence) == [(1, f"red circle</ref><box>{RED}</box>")]
