"""What the web page offers for a beginning: pictures drawn here, and questions that the small model can answer.

Example     a question in each language of the page, about pictures that were drawn from fixed seeds
EXAMPLES    those on the page
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from PIL import Image

from ..training.recipes.tiny_scenes import Split, draw, enlarged, scene

TIMES = 3  # as large as the pictures of the training, for people to look at
GAP = 12  # pixels between the pictures of an icon


@dataclass(frozen=True)
class Example:
    """Seeds of the test split's pictures, of which the training saw none, and a question by language code."""

    seeds: tuple[int, ...]
    questions: dict[str, str]

    @cached_property
    def pictures(self) -> list[Image.Image]:
        """The pictures that are asked about."""
        return [draw(enlarged(scene(Split.TEST.seed(seed), least=3), TIMES)) for seed in self.seeds]

    @property
    def icon(self) -> Image.Image:
        """All of them side by side, small."""
        height = 96
        shown = [image.resize((image.width * height // image.height, height)) for image in self.pictures]
        icon = Image.new("RGB", (sum(image.width + GAP for image in shown) - GAP, height), "white")
        left = 0
        for image in shown:
            icon.paste(image, (left, 0))
            left += image.width + GAP
        return icon


EXAMPLES = (
    Example((49,), {"en": "Detect all objects.", "zh": "检测所有物体。"}),
    Example((42,), {"en": "Box all the yellow diamonds.", "zh": "框出所有黄色菱形。"}),
    Example((47,), {"en": "What does the text say?", "zh": "图中写了什么？"}),
    Example((54, 49), {"en": "Which picture has more shapes?", "zh": "哪张图片的图形更多？"}),
)
