"""The words in which the small model is asked and answers: one table for each language."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """Phrases and questions; `{}` stands for a phrase, or for two in a relation."""

    name: str
    colours: dict[str, str]
    shapes: dict[str, tuple[str, str]]  # one, and several
    any_shape: tuple[str, str]
    spaced: bool  # words have spaces between them
    text: str  # what comes before a printed word
    printed: str  # any printed word
    commas: tuple[str, str]  # between items, and before the last
    full_stop: str
    raw_caption: str
    caption: tuple[str, ...]
    description: tuple[str, ...]
    box_one: tuple[str, ...]
    box_all: tuple[str, ...]
    none: str
    inside: tuple[str, ...]
    count: tuple[str, ...]
    colour: tuple[str, ...]
    shape: tuple[str, ...]
    exists: tuple[str, ...]
    there: tuple[str, str]  # no, yes: to "is there"
    correct: tuple[str, str]  # no, yes: to "is it so"
    which_side: dict[tuple[str, str], str]
    is_side: dict[str, str]
    sides: dict[str, str]
    read: tuple[str, ...]
    no_text: str
    more: str
    which_picture: str
    same_number: str
    pictures: tuple[str, str]
    box_it: str
    shape_it: str
    colour_it: str
    others: str
    side_it: str

    def phrase(self, colour: str | None, shape: str | None, number: int) -> str:
        """`red circle`, `circles`, `red shape`: for one thing, or for another number of them."""
        noun = (self.any_shape if shape is None else self.shapes[shape])[number != 1]
        if colour is None:
            return noun
        return self.colours[colour] + (" " if self.spaced else "") + noun

    def one(self, phrase: str) -> str:
        """A phrase with its indefinite article or measure word."""
        if not self.spaced:
            return f"一个{phrase}"
        return ("an " if phrase[0] in "aeiou" else "a ") + phrase

    def the(self, phrase: str) -> str:
        """A phrase with its definite article, where the language has one."""
        return f"the {phrase}" if self.spaced else phrase

    def join(self, pieces: Sequence[str]) -> str:
        """A list in a sentence: `a, b and c`."""
        if len(pieces) < 2:
            return "".join(pieces)
        return self.commas[0].join(pieces[:-1]) + self.commas[1] + pieces[-1]

    def sentence(self, text: str) -> str:
        """With a capital and a full stop."""
        return text[0].upper() + text[1:] + self.full_stop


ENGLISH = Language(
    name="English",
    colours={c: c for c in ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")},
    shapes={s: (s, s + "s") for s in ("circle", "square", "triangle", "star", "diamond")}
    | {"cross": ("cross", "crosses")},
    any_shape=("shape", "shapes"),
    spaced=True,
    text="the text ",
    printed="text",
    commas=(", ", " and "),
    full_stop=".",
    raw_caption="Generate the caption in English with grounding:",
    caption=("Describe the image with boxes.", "Box everything in the picture.", "Detect all objects."),
    description=("Describe the image.", "What is in the picture?", "Describe the image in English:"),
    box_one=("Box the {}.", "Where is the {}?", "Find the {}."),
    box_all=("Box all the {}.", "Where are the {}?", "Find the {}."),
    none="There is no {}.",
    inside=("What is in {}?", "What is in this box: {}?", "What is <ref>this</ref>{}?"),
    count=("How many {} are there?", "Count the {}."),
    colour=("What colour is the {}?", "Which color is the {}?"),
    shape=("What shape is the {}?", "What is the {}?"),
    exists=("Is there {}?", "Is there {} in the picture?"),
    there=("No", "Yes"),
    correct=("No", "Yes"),
    which_side={
        ("left", "right"): "Is the {} left or right of the {}?",
        ("above", "below"): "Is the {} above or below the {}?",
    },
    is_side={
        "left": "Is the {} left of the {}?",
        "right": "Is the {} right of the {}?",
        "above": "Is the {} above the {}?",
        "below": "Is the {} below the {}?",
    },
    sides={"left": "left", "right": "right", "above": "above", "below": "below"},
    read=("Read the text.", "What does the text say?", "What is written in the picture?"),
    no_text="There is no text.",
    more="Which picture has more shapes?",
    which_picture="Which picture has {}?",
    same_number="Do both pictures have the same number of shapes?",
    pictures=("Picture 1", "Picture 2"),
    box_it="Box it.",
    shape_it="What shape is it?",
    colour_it="What colour is it?",
    others="How many other shapes are there?",
    side_it="Is it left or right of the {}?",
)

CHINESE = Language(
    name="Chinese",
    colours={
        "red": "红色",
        "green": "绿色",
        "blue": "蓝色",
        "yellow": "黄色",
        "purple": "紫色",
        "orange": "橙色",
        "black": "黑色",
        "white": "白色",
    },
    shapes={
        "circle": ("圆形", "圆形"),
        "square": ("正方形", "正方形"),
        "triangle": ("三角形", "三角形"),
        "star": ("星形", "星形"),
        "diamond": ("菱形", "菱形"),
        "cross": ("十字形", "十字形"),
    },
    any_shape=("图形", "图形"),
    spaced=False,
    text="文字",
    printed="文字",
    commas=("、", "和"),
    full_stop="。",
    raw_caption="Generate the caption in Chinese with grounding:",
    caption=("描述这张图片并标出位置。", "框出图中所有物体。", "检测所有物体。"),
    description=("描述这张图片。", "图中有什么？", "用中文描述这张图片："),
    box_one=("框出{}。", "{}在哪里？", "找到{}。"),
    box_all=("框出所有{}。", "所有{}在哪里？", "找到所有{}。"),
    none="没有{}。",
    inside=("{}里是什么？", "这个框里是什么：{}？", "<ref>这</ref>{}是什么？"),
    count=("有几个{}？", "图中有多少个{}？"),
    colour=("{}是什么颜色？", "{}的颜色是什么？"),
    shape=("{}是什么形状？", "{}的形状是什么？"),
    exists=("有{}吗？", "图中有{}吗？"),
    there=("没有", "有"),
    correct=("不是", "是"),
    which_side={
        ("left", "right"): "{}在{}的左边还是右边？",
        ("above", "below"): "{}在{}的上面还是下面？",
    },
    is_side={
        "left": "{}在{}的左边吗？",
        "right": "{}在{}的右边吗？",
        "above": "{}在{}的上面吗？",
        "below": "{}在{}的下面吗？",
    },
    sides={"left": "左边", "right": "右边", "above": "上面", "below": "下面"},
    read=("读出文字。", "文字是什么？", "图中写了什么？"),
    no_text="没有文字。",
    more="哪张图片的图形更多？",
    which_picture="哪张图片有{}？",
    same_number="两张图片的图形一样多吗？",
    pictures=("图片1", "图片2"),
    box_it="框出它。",
    shape_it="它是什么形状？",
    colour_it="它是什么颜色？",
    others="还有几个图形？",
    side_it="它在{}的左边还是右边？",
)

LANGUAGES = (ENGLISH, CHINESE)
