"""Benchmarks of captions: nocaps and Flickr30K.

coco        a Reader of images and their captions, in COCO's form
examples    a Reader of captions for few-shot prompts, in the reference's form
karpathy    makes a Reader of one split of Karpathy's Flickr30K
CAPTIONS    the benchmarks
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..benchmark import Benchmark, Reader, Source
from ..forms import CAPTION
from ..items import Item, Places, Problem
from .answers import by_id
from .converted import PUBLISHED
from .files import Entry, Malformed, Unanswered, document, each, entries, list_of, members, text_of

FOLDERS = ("images", "val", "flickr30k-images", "flickr30k_images")


def coco(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:
    """Each of `images`, whose name is under `image`, as the reference has it, or `file_name`, with its captions."""
    found = document(files[0])
    known, problems = by_id(members(files[0], found, "annotations"), "image_id")
    yield from problems

    def make(_: str, image: Mapping[str, Any]) -> Item:
        name = text_of(image, "id")
        if name not in known:
            raise Unanswered("it has no caption")
        captions = [text_of(entry, "caption") for entry in known[name]]
        return _item(name, places, text_of(image, "image" if "image" in image else "file_name"), captions)

    yield from each(members(files[0], found, "images"), make)


def examples(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:
    """Each of `annotations`, which has its picture's name beside the caption, by its number."""

    def make(where: str, entry: Mapping[str, Any]) -> Item:
        return _item(where.rpartition(" ")[2], places, text_of(entry, "image"), [text_of(entry, "caption")])

    return each(entries(files[0], "annotations"), make)


def karpathy(split: str) -> Reader:
    """A reader of those of `images` that are in the split."""

    def within(path: Path) -> Iterator[Entry]:
        for where, image in entries(path, "images"):
            other = image.get("split") if isinstance(image, dict) else split
            if other == split or not isinstance(other, str):
                yield where, image

    def make(places: Places, image: Mapping[str, Any]) -> Item:
        text_of(image, "split")
        sentences = list_of(image, "sentences")
        if not all(isinstance(sentence, dict) for sentence in sentences):
            raise Malformed("a sentence is an object")
        captions = [text_of(sentence, "raw") for sentence in sentences]
        return _item(text_of(image, "imgid"), places, text_of(image, "filename"), captions)

    def read(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:
        return each(within(files[0]), lambda _, image: make(places, image))

    return read


def _item(name: str, places: Places, image: str, captions: list[str]) -> Item:
    return Item(id=name, pictures=(places.picture(image, FOLDERS),), truth=captions, shot=captions[0])


CAPTIONS: tuple[Benchmark, ...] = (
    Benchmark(
        name="nocaps",
        title="NoCaps val",
        folder="nocaps",
        form=CAPTION,
        sources=(
            Source(("nocaps_val.json",), coco, f"{PUBLISHED}/nocaps/nocaps_val.json"),
            Source(
                ("nocaps_val_4500_captions.json",),
                coco,
                "https://nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json",
            ),
        ),
        pictures="https://nocaps.org/download",
        published={"Qwen/Qwen-VL": {"CIDEr": 121.4}, "Qwen/Qwen-VL-Chat": {"CIDEr": 120.2}},
        size=4500,
        table=4,
    ),
    Benchmark(
        name="flickr",
        title="Flickr30K",
        folder="flickr30k",
        form=CAPTION,
        sources=(
            # The reference's script draws examples from the test split; these are from that for training.
            Source(
                ("flickr30k_karpathy_test.json",),
                coco,
                f"{PUBLISHED}/flickr30k/flickr30k_karpathy_test.json",
                ("flickr30k_karpathy_train.json",),
                examples,
            ),
            Source(
                ("dataset_flickr30k.json",),
                karpathy("test"),
                "https://cs.stanford.edu/people/karpathy/deepimagesent/",
                ("dataset_flickr30k.json",),
                karpathy("train"),
            ),
        ),
        pictures="https://bryanplummer.com/Flickr30kEntities/",
        published={"Qwen/Qwen-VL": {"CIDEr": 85.8}, "Qwen/Qwen-VL-Chat": {"CIDEr": 81.0}},
        size=1000,
        table=4,
    ),
)
