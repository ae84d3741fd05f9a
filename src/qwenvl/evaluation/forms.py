"""How benchmarks ask: the reference's prompts and decoding, one form for each kind of question.

Form    what is shown of an item, how the answer is got, and which metric scores it
parts   an item as the parts of a query
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..text.parts import Part, parse_tagged
from .items import Item

Way = Literal["generate", "chat", "losses"]
LETTERS = "ABCDEFGHIJ"
NO_HINT = "N/A"
JUDGED = "judged"  # the metric of forms whose answers another model judges


@dataclass(frozen=True)
class Form:
    """A kind of question.

    Attributes:
        metric: a name of `scoring.METRICS`.
        template: what follows the pictures, with `{text}`, `{hint}` and `{options}` in it.
        between: what follows each picture.
        way: "generate" goes on after the template, greedily; "chat" asks in ChatML, as the checkpoint's own generation
            config says; "losses" takes the option whose letter is the likeliest.
        max_new_tokens, min_new_tokens: of an answer; None: the checkpoint's.
        options: of decoding, in place of the checkpoint's, for "chat".
        region: after the pictures comes `<ref>{text}</ref><box>` instead, for the model to go on.
        numbered: pictures are shown as `Picture k:`, as in a chat.
        trusted: texts are this library's own, and tags in them become special ids.
    """

    metric: str
    template: str
    between: str = ""
    way: Way = "generate"
    max_new_tokens: int | None = None
    min_new_tokens: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    region: bool = False
    numbered: bool = False
    trusted: bool = False


CAPTION = Form("captions", "Describe the image in English:", max_new_tokens=30, min_new_tokens=8)
VQA = Form("vqa", "{text} Answer:", max_new_tokens=10)
DOCUMENT = Form("anls", "{text} Answer:", max_new_tokens=100)
CHART = Form("relaxed", "{text} Answer:", max_new_tokens=100)
EXACT = Form("exact", "{text} Answer:", max_new_tokens=10)
EXACT_LONG = Form("exact", "{text} Answer:", max_new_tokens=100)
GQA = Form("gqa", "{text} Answer:", max_new_tokens=10)
REGION = Form("grounding", "", max_new_tokens=28, min_new_tokens=10, region=True)
CHOICE = Form("choice", "Context: {hint}\nQuestion: {text}\nOptions: {options}\nAnswer:", way="losses")
CHOICE_LETTER = Form("letter", CHOICE.template, max_new_tokens=10)
CIRCULAR = Form("circular", CHOICE.template, way="losses")
SEED = Form("choice", "Question: {text}\nOptions: {options}\nAnswer:", between="\n", way="losses")
MME = Form("mme", "{text}", between="\n", way="chat", options={"top_p": 0.01})
TOUCHSTONE = Form(JUDGED, "{text}", way="chat")
SMALL = Form(
    "small", "{text}", way="chat", max_new_tokens=192, options={"do_sample": False}, numbered=True, trusted=True
)


def parts(form: Form, item: Item, shots: Sequence[Item] = ()) -> list[Part]:
    """The item as a query, behind the `shots`, each with its answer.

    As in the reference, examples follow one another without a mark between them. Texts are data: none of them becomes
    special ids.
    """
    query: list[Part] = []
    for shown in (*shots, item):
        for picture in shown.pictures:
            query.append({"image": picture, "numbered": form.numbered})
            if form.between:
                query.append({"text": form.between})
        if form.region:
            query.append({"ref": shown.text, "box": None})
        else:
            options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, shown.options, strict=False))
            text = form.template.format(text=shown.text, hint=shown.hint or NO_HINT, options=options)
            query += parse_tagged(text) if form.trusted else [{"text": text}]
        if shown is not item:
            query.append({"text": f" {shown.shot}"})
    return query
