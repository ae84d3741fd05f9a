"""Questions and answers about the small model's pictures, in English and Chinese, in the paper's formats.

    Exchange        one question and its answer, as trusted tagged texts, and the skill that it takes
    SKILLS          skill -> function that asks about a scene (None where the scene has nothing to ask)
    compare         a question about two pictures
    dialogue        several questions, of which the later ones refer back
    raw_form        an exchange as a base model completes it

Everything is drawn from the generator that is passed in, so a seed and a scene give the same questions for ever.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...text.boxes import points_text, to_thousandths
from .tiny_scenes import COLOURS, SHAPES, Scene, Thing
from .tiny_words import Language

Corners = tuple[int, int, int, int]  # x1, y1, x2, y2 in thousandths

LEAST_OFFSET = 0.1  # of the picture's side between two centres, for "left of" to be plain to see


@dataclass(frozen=True)
class Exchange:
    """A question and its answer. `phrase` is what a `box` exchange looks for, `targets` the places that it means."""

    skill: str
    question: str
    answer: str
    language: Language
    phrase: str = ""
    targets: tuple[Corners, ...] = ()


@dataclass(frozen=True)
class Group:
    """The things that a description means: by colour, by shape, by both, or all."""

    colour: str | None
    shape: str | None
    things: tuple[Thing, ...]

    def name(self, language: Language) -> str:
        """`red circle`, or `red circles` where it means several."""
        return language.phrase(self.colour, self.shape, max(len(self.things), 1))


def group(scene: Scene, colour: str | None, shape: str | None) -> Group:
    """The shapes of a scene with this colour and this shape, where given."""
    found = (t for t in scene.shapes if (colour is None or t.colour == colour) and (shape is None or t.shape == shape))
    return Group(colour, shape, tuple(found))


def place(scene: Scene, thing: Thing) -> Corners:
    """A thing's box in thousandths."""
    return to_thousandths(thing.box, scene.width, scene.height)


def boxes_text(places: Sequence[Corners]) -> str:
    """Boxes as the model writes them."""
    return "".join(f"<box>{points_text(p)}</box>" for p in places)


def _grounded(phrase: str, *places: Corners) -> str:
    """A phrase and its boxes, as the model writes them."""
    return f"<ref>{phrase}</ref>{boxes_text(places)}"


def _pick(rng: random.Random, scene: Scene, *, lone: bool = False) -> Group | None:
    """A description of something in the scene: mostly by colour and shape. `lone`: of one thing alone."""
    if not scene.shapes:
        return None
    thing = rng.choice(scene.shapes)
    ways = [(thing.colour, thing.shape)] * 3 + [(thing.colour, None), (None, thing.shape)]
    rng.shuffle(ways)
    for colour, shape in ways:
        found = group(scene, colour, shape)
        if not lone or len(found.things) == 1:
            return found
    return None


def _absent(rng: random.Random, scene: Scene) -> Group:
    """A description of nothing in the scene; more often than not one whose colour and shape both occur apart."""
    near = [
        (a.colour, b.shape) for a in scene.shapes for b in scene.shapes if not group(scene, a.colour, b.shape).things
    ]
    if near and rng.random() < 0.6:
        return group(scene, *rng.choice(near))
    while True:
        colour, shape = rng.choice((*COLOURS, None)), rng.choice((*SHAPES, None))
        if (colour or shape) and not (found := group(scene, colour, shape)).things:
            return found


# One picture


def caption(rng: random.Random, scene: Scene, language: Language) -> Exchange:
    """Everything in the picture with its box, from left to right; a printed word last."""
    pieces = [_grounded(language.phrase(t.colour, t.shape, 1), place(scene, t)) for t in scene.shapes]
    if scene.text is not None:
        pieces.append(language.text + _grounded(scene.text.word or "", place(scene, scene.text)))
    return Exchange("caption", rng.choice(language.caption), language.join(pieces), language)


def description(rng: random.Random, scene: Scene, language: Language) -> Exchange:
    """Everything in the picture without boxes."""
    pieces = [language.one(language.phrase(t.colour, t.shape, 1)) for t in scene.shapes]
    if scene.text is not None:
        pieces.append(f"{language.text}{scene.text.word}")
    return Exchange("description", rng.choice(language.description), language.sentence(language.join(pieces)), language)


def box(rng: random.Random, scene: Scene, language: Language) -> Exchange | None:
    """Box the phrase: one thing, several, or none."""
    if rng.random() < 0.08:
        phrase = _absent(rng, scene).name(language)
        return Exchange("absent", rng.choice(language.box_one).format(phrase), language.none.format(phrase), language)
    if scene.text is not None and rng.random() < 0.1:
        phrase = language.printed
        where: tuple[Corners, ...] = (place(scene, scene.text),)
        questions = language.box_one
    else:
        found = _pick(rng, scene)
        if found is None:
            return None
        where, phrase = tuple(place(scene, t) for t in found.things), found.name(language)
        questions = language.box_one if len(where) == 1 else language.box_all
    skill = "box" if len(where) == 1 else "boxes"
    sought = language.the(phrase) if rng.random() < 0.3 else phrase  # people write both
    return Exchange(skill, rng.choice(questions).format(phrase), _grounded(phrase, *where), language, sought, where)


def inside(rng: random.Random, scene: Scene, language: Language) -> Exchange | None:
    """What is in this box: the corners may be a little off."""
    if not scene.shapes:
        return None
    thing = rng.choice(scene.shapes)
    x1, y1, x2, y2 = (min(max(v + rng.randint(-12, 12), 0), 1000) for v in place(scene, thing))
    question = rng.choice(language.inside).format(boxes_text([(x1, y1, x2, y2)]))
    return Exchange("inside", question, language.phrase(thing.colour, thing.shape, 1), language)


def count(rng: random.Random, scene: Scene, language: Language) -> Exchange:
    """How many: of all shapes, of a colour, of a shape; sometimes none."""
    chance = rng.random()
    if chance < 0.45:
        found = group(scene, None, None)
    elif chance < 0.6 or not scene.shapes:
        found = _absent(rng, scene)
    else:
        thing = max(rng.sample(scene.shapes, min(2, len(scene.shapes))), key=lambda t: _company(scene, t))
        found = group(scene, *rng.choice(((thing.colour, None), (None, thing.shape))))
    name = language.phrase(found.colour, found.shape, 2)
    return Exchange("count", rng.choice(language.count).format(name), str(len(found.things)), language)


def _company(scene: Scene, thing: Thing) -> int:
    """How many share its colour or its shape."""
    return max(len(group(scene, thing.colour, None).things), len(group(scene, None, thing.shape).things))


def colour(rng: random.Random, scene: Scene, language: Language) -> Exchange | None:
    """The colour of the only circle."""
    lone = [t for t in scene.shapes if len(group(scene, None, t.shape).things) == 1]
    if not lone:
        return None
    thing = rng.choice(lone)
    question = rng.choice(language.colour).format(language.phrase(None, thing.shape, 1))
    return Exchange("colour", question, language.colours[thing.colour], language)


def shape(rng: random.Random, scene: Scene, language: Language) -> Exchange | None:
    """The shape of the only red thing."""
    lone = [t for t in scene.shapes if len(group(scene, t.colour, None).things) == 1]
    if not lone:
        return None
    thing = rng.choice(lone)
    question = rng.choice(language.shape).format(language.phrase(thing.colour, None, 1))
    return Exchange("shape", question, language.shapes[thing.shape][0], language)


def exists(rng: random.Random, scene: Scene, language: Language) -> Exchange | None:
    """Is there one: yes and no equally often."""
    there = rng.random() < 0.5
    found = _pick(rng, scene) if there else _absent(rng, scene)
    if found is None:
        return None
    name = language.phrase(found.colour, found.shape, 1)
    return Exchange("exists", rng.choice(language.exists).format(language.one(name)), language.there[there], language)


def relation(rng: random.Random, scene: Scene, language: Language) -> Exchange | None:
    """Left, right, above or below: as a choice, or as yes and no."""
    lone = [t for t in scene.shapes if len(group(scene, t.colour, t.shape).things) == 1]
    if len(lone) < 2:
        return None
    one, other = rng.sample(lone, 2)
    dx = (one.centre[0] - other.centre[0]) / scene.width
    dy = (one.centre[1] - other.centre[1]) / scene.height
    axes = [(sides, d) for sides, d in ((("left", "right"), dx), (("above", "below"), dy)) if abs(d) > LEAST_OFFSET]
    if not axes:
        return None
    sides, offset = rng.choice(axes)
    names = [language.phrase(t.colour, t.shape, 1) for t in (one, other)]
    true = sides[offset > 0]
    if rng.random() < 0.5:
        question = language.which_side[sides].format(*names)
        return Exchange("relation", question, language.sides[true], language)
    asked = rng.choice(sides)
    return Exchange("relation", language.is_side[asked].format(*names), language.correct[asked == true], language)


def text(rng: random.Random, scene: Scene, language: Language) -> Exchange | None:
    """Read the printed word; seldom where there is none."""
    if scene.text is None:
        return Exchange("text", rng.choice(language.read), language.no_text, language) if rng.random() < 0.05 else None
    return Exchange("text", rng.choice(language.read), scene.text.word or "", language)


Asking = Callable[[random.Random, Scene, Language], "Exchange | None"]
SKILLS: dict[str, Asking] = {
    "caption": caption,
    "description": description,
    "box": box,
    "inside": inside,
    "count": count,
    "colour": colour,
    "shape": shape,
    "exists": exists,
    "relation": relation,
    "text": text,
}


# Two pictures, and several rounds


def compare(rng: random.Random, first: Scene, second: Scene, language: Language) -> Exchange:
    """Which picture has more shapes, or a thing that the other has not; or whether both have one."""
    counts = len(first.shapes), len(second.shapes)
    equal = counts[0] == counts[1]
    only = [
        (t, number)
        for number, (here, there) in enumerate(((first, second), (second, first)))
        for t in here.shapes
        if not group(there, t.colour, t.shape).things
    ]
    chance = rng.random()
    if chance < (0.6 if equal else 0.15) or (equal and not only):  # a fifth are equal: yes about as often as no
        return Exchange("compare", language.same_number, language.correct[equal], language)
    if not equal and (chance < 0.55 or not only):
        return Exchange("compare", language.more, language.pictures[counts[1] > counts[0]], language)
    thing, number = rng.choice(only)
    name = language.one(language.phrase(thing.colour, thing.shape, 1))
    return Exchange("compare", language.which_picture.format(name), language.pictures[number], language)


def dialogue(rng: random.Random, scene: Scene, language: Language) -> list[Exchange]:
    """Rounds about one thing: the first names it, the others say `it`. Empty where nothing can be named alone."""
    opening = _pick(rng, scene, lone=True)
    if opening is None:
        return []
    thing = opening.things[0]
    name, where = opening.name(language), place(scene, thing)
    full = language.phrase(thing.colour, thing.shape, 1)
    boxed = _grounded(full, where)
    later = [
        Exchange("dialogue", language.shape_it, language.shapes[thing.shape][0], language),
        Exchange("dialogue", language.colour_it, language.colours[thing.colour], language),
        Exchange("dialogue", language.others, str(len(scene.shapes) - 1), language),
    ]
    if rng.random() < 0.5:
        question = rng.choice(language.exists).format(language.one(name))
        rounds = [Exchange("dialogue", question, language.there[True], language)]
        later.append(Exchange("dialogue", language.box_it, boxed, language, full, (where,)))
    else:
        question = rng.choice(language.box_one).format(name)
        rounds = [Exchange("dialogue", question, _grounded(name, where), language, name, (where,))]
    others = [t for t in scene.shapes if t is not thing and len(group(scene, t.colour, t.shape).things) == 1]
    if others:
        other = rng.choice(others)
        offset = (thing.centre[0] - other.centre[0]) / scene.width
        if abs(offset) > LEAST_OFFSET:
            question = language.side_it.format(language.phrase(other.colour, other.shape, 1))
            later.append(Exchange("dialogue", question, language.sides[("left", "right")[offset > 0]], language))
    rng.shuffle(later)
    return [*rounds, *later[: rng.randint(2, 4)]]


# The base form


def raw_form(exchange: Exchange) -> tuple[str, str]:
    """What a base model is given and what it goes on with, as in the paper's pretraining."""
    if exchange.skill == "caption":
        return exchange.language.raw_caption, " " + exchange.answer
    if exchange.targets:
        opened, closed = f"<ref>{exchange.phrase}</ref><box>", boxes_text(exchange.targets)
        return opened, closed.removeprefix("<box>")
    return f"{exchange.question} Answer:", " " + exchange.answer
