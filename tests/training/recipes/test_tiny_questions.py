"""The small model's questions: every answer is true, found out again here without the code that made it."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from support import write_vocabulary

from qwenvl.text.boxes import parse_spans
from qwenvl.text.parts import Part, parse_tagged
from qwenvl.text.prompt import chatml_prompt, raw_prompt, training_example
from qwenvl.text.tokenizer import IMAGE_TAGS, Tokenizer
from qwenvl.training.recipes.tiny_questions import SKILLS, Exchange, compare, dialogue, raw_form
from qwenvl.training.recipes.tiny_scenes import Scene, Split, Thing, scene
from qwenvl.training.recipes.tiny_words import CHINESE, ENGLISH, LANGUAGES, Language

Corners = tuple[int, ...]

# The words as this test reads them, by hand: what a phrase says of colour and shape.
_COLOURS = re.findall(r"\w+", "red 红色 green 绿色 blue 蓝色 yellow 黄色 purple 紫色 orange 橙色 black 黑色 white 白色")
_SHAPES = re.findall(r"\w+", "circle 圆形 square 正方形 triangle 三角形 star 星形 diamond 菱形")
COLOURS = {word: _COLOURS[k - k % 2] for k, word in enumerate(_COLOURS)}
SHAPES = {word: _SHAPES[k - k % 2] for k, word in enumerate(_SHAPES)}
SHAPES |= {f"{word}s": word for word in _SHAPES[::2]} | dict.fromkeys(("cross", "crosses", "十字形"), "cross")
ANY = {"shape", "shapes", "图形"}
PHRASE = f"(?:(?P<colour>{'|'.join(COLOURS)}) ?)?(?P<shape>{'|'.join(sorted([*SHAPES, *ANY], key=len, reverse=True))})"
A_PHRASE = re.compile(rf"(?<![a-z]){PHRASE}(?![a-z])")
SIDES: dict[str, Callable[[float, float], bool]] = {
    "left": lambda dx, _: dx < 0,
    "right": lambda dx, _: dx > 0,
    "above": lambda _, dy: dy < 0,  # pictures grow downward
    "below": lambda _, dy: dy > 0,
}
SIDES |= {"左边": SIDES["left"], "右边": SIDES["right"], "上面": SIDES["above"], "下面": SIDES["below"]}
TRUTH = {"Yes": True, "No": False, "是": True, "不是": False, "有": True, "没有": False}

KNOWN = [
    ("Box the red triangle.", "<ref>red triangle</ref><box>(305,776),(448,948)</box>"),
    ("How many shapes are there?", "4"),
    ("Is the black triangle above the blue diamond?", "Yes"),
    ("Is there a red triangle in the picture?", "Yes"),
]  # of one seed


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """Many, half of them with a word."""
    return [scene(Split.VALIDATION.seed(k), words=0.5) for k in range(500)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small vocabulary with merges that could go across the borders of pieces."""
    words = "Picture system user assistant The circle square Box the 红色 圆形 正方形 是什么 Answer"
    return Tokenizer(write_vocabulary(tmp_path_factory.mktemp("words"), words))


def asked(scenes: list[Scene], skill: str, times: int = 2) -> Iterator[tuple[Scene, Exchange]]:
    """What a skill asks about these scenes, several times, in both languages."""
    for number, shown in enumerate(scenes):
        for language in LANGUAGES:
            rng = random.Random(f"{number} {language.name}")
            for _ in range(times):
                exchange = SKILLS[skill](rng, shown, language)
                if exchange is not None:
                    assert exchange.language is language
                    yield shown, exchange


def shapes_of(shown: Scene) -> list[Thing]:
    """Things without a word."""
    return [thing for thing in shown.things if thing.word is None]


def meant(shown: Scene, phrase: str) -> list[Thing]:
    """The shapes that a phrase (`red circles`, `红色圆形`, `shapes`) describes."""
    found = A_PHRASE.fullmatch(phrase)
    assert found is not None, phrase
    colour, shape = found["colour"], found["shape"]
    return [
        thing
        for thing in shapes_of(shown)
        if (colour is None or COLOURS[colour] == thing.colour) and (shape in ANY or SHAPES[shape] == thing.shape)
    ]


def phrases(text: str) -> list[str]:
    """The phrases in a sentence, in order."""
    return [found.group() for found in A_PHRASE.finditer(text)]


def thousandths(shown: Scene, thing: Thing) -> Corners:
    """A thing's box on the model's scale, rounded."""
    box = thing.box
    return (
        round(1000 * box.x1 / shown.width),
        round(1000 * box.y1 / shown.height),
        round(1000 * box.x2 / shown.width),
        round(1000 * box.y2 / shown.height),
    )


def boxes(text: str) -> list[Corners]:
    """The boxes in a text, strictly as the format has them."""
    return [tuple(map(int, found)) for found in re.findall(r"<box>\((\d+),(\d+)\),\((\d+),(\d+)\)</box>", text)]


def by_place(shown: Scene, things: list[Thing]) -> list[Corners]:
    """Their boxes, left to right by their middles."""
    ordered = sorted(things, key=lambda t: (t.box.x1 + t.box.x2, t.box.y1 + t.box.y2))
    return [thousandths(shown, thing) for thing in ordered]


# One picture


def test_captions(scenes: list[Scene]) -> None:
    """Everything is named with its box, once, from left to right, and the printed word behind."""
    for shown, exchange in asked(scenes, "caption", 1):
        regions = parse_spans(exchange.answer)
        ordered = sorted(shapes_of(shown), key=lambda t: (t.box.x1 + t.box.x2, t.box.y1 + t.box.y2))
        word = [shown.text] if shown.text is not None else []
        assert [tuple(map(int, (*r.points[0], *r.points[1]))) for r in regions] == [
            thousandths(shown, thing) for thing in (*ordered, *word)
        ]
        for region, thing in zip(regions, ordered, strict=False):
            assert thing in meant(shown, str(region.label))
            assert len(str(region.label).split()) == 2 or exchange.language is CHINESE
        assert not word or regions[-1].label == word[0].word
        assert not exchange.targets


def test_descriptions(scenes: list[Scene]) -> None:
    """The same without boxes."""
    for shown, exchange in asked(scenes, "description", 1):
        told = phrases(re.split("the text|文字", exchange.answer.lower())[0])
        assert Counter(told) == Counter(exchange.language.phrase(t.colour, t.shape, 1) for t in shapes_of(shown))
        assert shown.text is None or str(shown.text.word) in exchange.answer
        assert "<" not in exchange.answer


def test_boxes(scenes: list[Scene]) -> None:
    """Boxes are those of all things that the phrase means; `no such thing` is said of what is not there."""
    kinds: Counter[str] = Counter()
    for shown, exchange in asked(scenes, "box"):
        kinds[exchange.skill] += 1
        if exchange.skill == "absent":
            (sought,) = phrases(exchange.question)
            assert not meant(shown, sought)
            assert phrases(exchange.answer) == [sought]
            assert not exchange.targets
            continue
        label = exchange.phrase.removeprefix("the ")
        printed = label in ("text", "文字")
        wanted = [thousandths(shown, shown.text)] if printed and shown.text else by_place(shown, meant(shown, label))
        assert boxes(exchange.answer) == wanted == list(exchange.targets)
        assert exchange.skill == ("box" if len(wanted) == 1 else "boxes")
        assert label in exchange.question
        assert exchange.answer.startswith(f"<ref>{label}</ref><box>")
        if exchange.language is ENGLISH and not printed:
            assert label.endswith("s") == (len(wanted) > 1 or label.endswith("cross")), label
            assert bool(re.search(r"\ball the\b|\bare\b", exchange.question)) <= (len(wanted) > 1)
    assert min(kinds.values()) > 50
    assert set(kinds) == {"box", "boxes", "absent"}


def test_what_is_inside(scenes: list[Scene]) -> None:
    """The box in the question lies nearly on the thing that is named, nearer than on any other."""
    for shown, exchange in asked(scenes, "inside"):
        (place,) = boxes(exchange.question)
        distance = {
            thing: max(abs(a - b) for a, b in zip(place, thousandths(shown, thing), strict=True))
            for thing in shapes_of(shown)
        }
        nearest = min(distance, key=lambda thing: distance[thing])
        assert distance[nearest] <= 12
        assert all(0 <= v <= 1000 for v in place)
        assert exchange.answer == exchange.language.phrase(nearest.colour, nearest.shape, 1)
        assert len(parse_tagged(exchange.question)) >= 2  # the box is structure, not characters


def test_counts(scenes: list[Scene]) -> None:
    """The number of what the question names: zero too, and every number up to the most that there are."""
    found: Counter[str] = Counter()
    for shown, exchange in asked(scenes, "count"):
        (name,) = phrases(exchange.question)
        assert exchange.answer == str(len(meant(shown, name)))
        assert exchange.language is CHINESE or name.endswith("s")
        found[exchange.answer] += 1
    assert set(found) == set("012345")


def test_colours_and_shapes(scenes: list[Scene]) -> None:
    """One thing alone is meant, and it has that colour or shape."""
    for shown, exchange in asked(scenes, "colour"):
        (name,) = phrases(exchange.question)
        (thing,) = meant(shown, name)
        assert COLOURS[exchange.answer] == thing.colour
    for shown, exchange in asked(scenes, "shape"):
        (name,) = [name for name in phrases(exchange.question) if name not in ANY]
        (thing,) = meant(shown, name)
        assert SHAPES[exchange.answer] == thing.shape


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.name)
def test_existence(scenes: list[Scene], language: Language) -> None:
    """Yes if there is one, no if not, about equally often; half of what is not there looks as if it might be."""
    found: Counter[bool] = Counter()
    near = 0
    for shown, exchange in asked(scenes, "exists", 4):
        if exchange.language is language:
            (name,) = phrases(exchange.question)
            answer = TRUTH[exchange.answer]
            assert bool(meant(shown, name)) == answer
            found[answer] += 1
            colours, shapes = ({getattr(t, kind) for t in shapes_of(shown)} for kind in ("colour", "shape"))
            words = A_PHRASE.fullmatch(name)
            assert words is not None
            near += not answer and COLOURS.get(words["colour"]) in colours and SHAPES.get(words["shape"]) in shapes
    assert 0.46 < found[True] / found.total() < 0.54
    assert near / found[False] > 0.35


def test_relations(scenes: list[Scene]) -> None:
    """Sides are those of the middles, with y growing downward; both things are named so that no other is meant."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for shown, exchange in asked(scenes, "relation", 4):
        (one,), (other,) = (meant(shown, name) for name in phrases(exchange.question))
        offsets = [
            sum(getattr(one.box, f"{axis}{k}") - getattr(other.box, f"{axis}{k}") for k in (1, 2)) / 2 / size
            for axis, size in (("x", shown.width), ("y", shown.height))
        ]
        if exchange.answer in TRUTH:
            (side,) = [side for side in SIDES if side in exchange.question]
            assert SIDES[side](*offsets) == TRUTH[exchange.answer], exchange
            seen[exchange.language.name + " is it"][exchange.answer] += 1
        else:
            side = exchange.answer
            assert SIDES[side](*offsets)
            assert side in exchange.question
            seen[exchange.language.name + " which"][side] += 1
        assert abs(offsets[side in ("above", "below", "上面", "下面")]) > 0.1  # plain to see
    assert len(seen) == 4
    for kind, answers in seen.items():
        assert len(answers) == (2 if "is it" in kind else 4)
        assert min(answers.values()) > 0.7 * answers.total() / len(answers), (kind, answers)


def test_reading(scenes: list[Scene]) -> None:
    """What is printed, letter for letter; seldom `no text`, and only where there is none."""
    without = 0
    for shown, exchange in asked(scenes, "text"):
        if shown.text is None:
            assert exchange.answer in ("There is no text.", "没有文字。")
            without += 1
        else:
            assert exchange.answer == shown.text.word
    assert 10 < without < 100


# Two pictures, and rounds


def test_comparisons(scenes: list[Scene]) -> None:
    """The picture with more shapes, or the only one that has a thing, or whether they have as many."""
    kinds: Counter[str] = Counter()
    for number, (first, second) in enumerate(pairwise(scenes)):
        for language in LANGUAGES:
            exchange = compare(random.Random(number), first, second, language)
            counts = len(shapes_of(first)), len(shapes_of(second))
            picture = {"1": 0, "2": 1}.get(exchange.answer[-1])
            if exchange.answer in TRUTH:
                assert TRUTH[exchange.answer] == (counts[0] == counts[1])
                kinds["same number"] += 1
            elif exchange.question in ("Which picture has more shapes?", "哪张图片的图形更多？"):
                assert picture == (counts[1] > counts[0])
                assert counts[0] != counts[1]
                kinds["more"] += 1
            else:
                (name,) = phrases(exchange.question)
                assert [bool(meant(shown, name)) for shown in (first, second)] == [picture == 0, picture == 1]
                kinds[f"which {picture}"] += 1
    assert len(kinds) == 4
    assert min(kinds.values()) > 60


def test_dialogues(scenes: list[Scene]) -> None:
    """The first round names one thing alone, or boxes it, and what the others say of `it` is true of that thing."""
    boxed_first = 0
    asked_of_it: Counter[str] = Counter()
    for number, shown in enumerate(scenes):
        for language in LANGUAGES:
            rounds = dialogue(random.Random(number), shown, language)
            if not rounds:
                continue
            opening, *later = rounds
            (name,) = phrases(opening.question)
            (thing,) = meant(shown, name)
            if opening.targets:
                check_round(shown, thing, opening)
                boxed_first += 1
                assert not any(exchange.targets for exchange in later)
            else:
                assert TRUTH[opening.answer]
            assert 2 <= len(later) <= 4
            assert len({exchange.question for exchange in rounds}) == len(rounds)
            for exchange in later:
                check_round(shown, thing, exchange)
                asked_of_it[
                    re.sub(PHRASE, "", exchange.question) if exchange.answer in SIDES else exchange.question
                ] += 1
    assert boxed_first > 100
    assert min(asked_of_it.values()) > 100
    assert len(asked_of_it) == 2 * 5  # box, shape, colour, others, side


def check_round(shown: Scene, thing: Thing, exchange: Exchange) -> None:
    """One later round of a dialogue about a thing."""
    answer = exchange.answer
    if exchange.targets:
        assert boxes(answer) == [thousandths(shown, thing)] == list(exchange.targets)
        assert phrases(answer) == [exchange.phrase]
        assert thing in meant(shown, exchange.phrase)
    elif answer in COLOURS:
        assert COLOURS[answer] == thing.colour
        assert exchange.question in ("What colour is it?", "它是什么颜色？")
    elif answer in SHAPES:
        assert SHAPES[answer] == thing.shape
        assert exchange.question in ("What shape is it?", "它是什么形状？")
    elif answer.isdigit():
        assert int(answer) == len(shapes_of(shown)) - 1
    else:
        (other,) = [t for name in phrases(exchange.question) for t in meant(shown, name)]
        assert other is not thing
        assert SIDES[answer]((thing.box.x1 + thing.box.x2 - other.box.x1 - other.box.x2) / 2, 0)


# Words


def test_both_languages_ask_alike(scenes: list[Scene]) -> None:
    """From the same random numbers both languages ask the same: kinds, places and truth."""
    yes_and_no = {"Yes": "yes", "No": "no", "有": "yes", "没有": "no", "是": "yes", "不是": "no"}
    for skill, ask in SKILLS.items():
        for number, shown in enumerate(scenes[:150]):
            one, other = (ask(random.Random(number), shown, language) for language in LANGUAGES)
            assert (one is None) == (other is None), skill
            if one is not None and other is not None:
                assert (one.skill, one.targets) == (other.skill, other.targets)
                assert boxes(one.answer) == boxes(other.answer)
                assert boxes(one.question) == boxes(other.question)
                assert yes_and_no.get(one.answer) == yes_and_no.get(other.answer)
                assert [meant(shown, p) for p in phrases(one.question)] == [
                    meant(shown, p) for p in phrases(other.question)
                ] or skill == "shape"  # 的形状 names no "shape"


def test_every_question_of_a_language_is_asked(scenes: list[Scene]) -> None:
    """Nothing in the table of words is dead: every template and every word occurs."""
    texts: dict[str, set[str]] = {language.name: set() for language in LANGUAGES}
    for number, (shown, other) in enumerate(pairwise(scenes)):
        for language in LANGUAGES:
            rng = random.Random(number)
            exchanges: list[Exchange | None] = [ask(rng, shown, language) for ask in SKILLS.values()]
            exchanges += [compare(rng, shown, other, language), *dialogue(rng, shown, language)]
            for exchange in exchanges:
                if exchange is not None:
                    texts[language.name] |= {exchange.question, exchange.answer, raw_form(exchange)[0]}
    for language in LANGUAGES:
        every = "\n".join(texts[language.name])
        for name, value in vars(language).items():
            for template in strings(value):
                pattern = ".+".join(map(re.escape, re.split(r"\{\}", template)))
                assert name == "name" or re.search(pattern, every), (language.name, name, template)


def strings(value: Any) -> list[str]:
    """The texts in a field of a table of words."""
    if isinstance(value, dict):
        return [text for one in value.values() for text in strings(one)]
    if isinstance(value, tuple):
        return [text for one in value for text in strings(one)]
    return [value] if isinstance(value, str) else []


def test_grammar() -> None:
    """Articles, plurals, lists and sentences."""
    assert [ENGLISH.one(p) for p in ("orange star", "red star", "circle")] == [
        "an orange star",
        "a red star",
        "a circle",
    ]
    assert [ENGLISH.phrase("red", "cross", n) for n in (0, 1, 2)] == ["red crosses", "red cross", "red crosses"]
    assert [ENGLISH.phrase(None, "circle", 3), ENGLISH.phrase("blue", None, 1)] == ["circles", "blue shape"]
    assert [ENGLISH.join(list(letters)) for letters in ("", "a", "ab", "abc")] == ["", "a", "a and b", "a, b and c"]
    assert ENGLISH.sentence("a cat") == "A cat."
    assert ENGLISH.the("cat") == "the cat"
    assert [CHINESE.phrase("red", "circle", n) for n in (1, 2)] == ["红色圆形"] * 2
    assert [CHINESE.join(list(letters)) for letters in ("a", "ab", "abc")] == ["a", "a和b", "a、b和c"]
    assert (CHINESE.one("圆形"), CHINESE.the("圆形"), CHINESE.sentence("圆形")) == ("一个圆形", "圆形", "圆形。")


def test_no_question_has_a_stray_article(scenes: list[Scene]) -> None:
    """In English: a before consonants, an before vowels, no article twice, no blank left open, one end."""
    for skill in SKILLS:
        for _, exchange in asked(scenes[:100], skill, 1):
            text = exchange.question
            assert not re.search(r"[{}]|  |\bthe the\b|\ba (the|a|an)\b|\ba [aeiou]|\ban [^aeiou]", text), text
            assert text[-1] in "?.:？。："
            assert text == text.strip()


# Training asks as use does


def test_the_base_form_is_what_ground_asks(scenes: list[Scene], tokenizer: Tokenizer) -> None:
    """For boxes the base form begins with exactly the ids of `Pipeline.ground`, and goes on to the answer's end."""
    for _, exchange in asked(scenes[:100], "box", 1):
        if not exchange.targets:
            continue
        given, answer = raw_form(exchange)
        parts: list[Part] = [{"image": "picture"}, {"ref": exchange.phrase, "box": None}]  # as `ground` has them
        expected = raw_prompt(tokenizer, parts, n_queries=4, numbered=False).ids
        span = [tokenizer.image_start_id, *[tokenizer.image_pad_id] * 4, tokenizer.image_end_id]
        assert span + tokenizer.encode_tagged(given, IMAGE_TAGS) == expected
        assert boxes(given + answer) == list(exchange.targets)
        assert (given + answer).endswith("</box>")


def test_the_base_form_of_captions_and_questions(scenes: list[Scene], tokenizer: Tokenizer) -> None:
    """As in the reference: the caption's prompt by language, `question Answer:`, each answered behind a space."""
    for skill, ending in (("caption", "with grounding:"), ("count", "Answer:"), ("inside", "Answer:")):
        for _, exchange in asked(scenes[:50], skill, 1):
            given, answer = raw_form(exchange)
            assert given.endswith(ending)
            assert answer == " " + exchange.answer
            assert skill == "caption" or given == f"{exchange.question} Answer:"
            assert skill != "caption" or exchange.language.name in given
            parts: list[Part] = [{"image": "picture"}, *parse_tagged(given)]
            prompt = raw_prompt(tokenizer, parts, n_queries=4, numbered=False).ids
            assert prompt[6:] == tokenizer.encode_tagged(given, IMAGE_TAGS)


@pytest.mark.parametrize("skill", list(SKILLS))
def test_a_training_text_begins_with_what_chat_asks(scenes: list[Scene], tokenizer: Tokenizer, skill: str) -> None:
    """ChatML of an exchange is the ids of the prompt of `Pipeline.chat`, then the answer's."""
    for _, exchange in asked(scenes[:40], skill, 1):
        parts: list[Part] = [{"image": "picture"}, *parse_tagged(exchange.question)]
        prompt = chatml_prompt(tokenizer, parts, n_queries=4).ids
        messages = [
            {"from": "user", "value": f"Picture 1:<img>1</img>\n{exchange.question}"},
            {"from": "assistant", "value": exchange.answer},
        ]
        example = training_example(tokenizer, messages, 2048, n_queries=4)
        assert example.ids[: len(prompt)] == prompt
        answer = tokenizer.encode_tagged(exchange.answer, IMAGE_TAGS)
        assert example.ids[len(prompt) :][: len(answer) + 1] == [*answer, tokenizer.im_end_id]
        assert example.labels[len(prompt) :][: len(answer) + 1] == [*answer, tokenizer.im_end_id]


def test_it_stays_what_it_is() -> None:
    """A seed and a scene give the same questions for ever: another draw's order would be another training."""
    shown = scene(Split.TEST.seed(3), words=0.0)
    told = [SKILLS[skill](random.Random(7), shown, ENGLISH) for skill in ("box", "count", "relation", "exists")]
    assert [(one.question, one.answer) for one in told if one is not None] == KNOWN
