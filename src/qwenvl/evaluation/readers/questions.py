"""Benchmarks of questions about photographs: VQAv2, OK-VQA, TextVQA, VizWiz and GQA.

visualqa     a Reader of visualqa.org's questions and annotations, of VQAv2 and OK-VQA
textvqa      a Reader of TextVQA's own files
vizwiz       makes a Reader of VizWiz' own files
gqa          a Reader of GQA's own files
figures      the paper's, of both models
QUESTIONS    the benchmarks
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..benchmark import Benchmark, Reader, Source
from ..forms import GQA, VQA
from ..items import DataError, Item, Places, Problem
from .answers import annotation, by_id, commonest, people_of, texts_of
from .converted import answered, people, reference, unanswered
from .files import document, each, entries, members, text_of

COCO_PICTURES = "http://images.cocodataset.org/zips"
VIZWIZ = "https://vizwiz.cs.colorado.edu/VizWiz_final"
BASE, CHAT = "Qwen/Qwen-VL", "Qwen/Qwen-VL-Chat"


def visualqa(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:
    """Each of `questions`, with the answers of people from the second file's `annotations`, if there is a second."""
    questions = document(files[0])
    subset = questions.get("data_subtype") if isinstance(questions, dict) else None
    if not isinstance(subset, str):
        raise DataError(f"{files[0]} should have a text 'data_subtype', such as \"val2014\"")
    known, problems = by_id(entries(files[1], "annotations"), "question_id") if files[1:] else ({}, [])
    yield from problems
    photos = "test2015" if subset.startswith("test") else subset  # those of test-dev2015, too

    def make(_: str, entry: Mapping[str, Any]) -> Item:
        name = text_of(entry, "question_id")
        image = f"COCO_{photos}_{text_of(entry, 'image_id').zfill(12)}.jpg"
        answers = people_of(annotation(known, name)) if files[1:] else None
        return Item(
            id=name,
            pictures=(places.picture(image, (f"coco/{photos}", photos)),),
            text=text_of(entry, "question"),
            truth=answers,
            shot=commonest(answers) if answers else "",
        )

    yield from each(members(files[0], questions, "questions"), make)


def textvqa(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:
    """Each of `data`, whose answers are texts; the pictures of both splits are in one folder."""

    def make(_: str, entry: Mapping[str, Any]) -> Item:
        answers = people_of(entry, numbered=True)
        image = places.picture(f"{text_of(entry, 'image_id')}.jpg", ("train_images", "train_val_images/train_images"))
        return Item(
            text_of(entry, "question_id"), (image,), text_of(entry, "question"), answers, shot=commonest(answers)
        )

    return each(entries(files[0], "data"), make)


def vizwiz(*, public: bool) -> Reader:
    """A reader of VizWiz' list of questions, by the name of the picture, about each of which there is one."""

    def make(places: Places, split: str, entry: Mapping[str, Any]) -> Item:
        name = text_of(entry, "image")
        answers = people_of(entry, numbered=True) if public else None
        return Item(
            id=name,
            pictures=(places.picture(name, (split,)),),
            text=text_of(entry, "question"),
            truth=answers,
            shot=commonest(answers) if answers else "",
        )

    def read(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:
        return each(entries(files[0]), lambda _, entry: make(places, files[0].stem, entry))

    return read


def gqa(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:
    """Each question of an object whose keys are the ids."""
    path = files[0]
    found = document(path)
    if not isinstance(found, dict):
        raise DataError(f"{path} should be an object with a question for each id")

    def make(where: str, entry: Mapping[str, Any]) -> Item:
        answers = texts_of(entry, "answer")
        image = places.picture(f"{text_of(entry, 'imageId')}.jpg", ("images",))
        name = where.removeprefix(f"{path.name} ")
        return Item(name, (image,), text_of(entry, "question"), answers, shot=answers[0])

    return each(((f"{path.name} {name}", entry) for name, entry in found.items()), make)


def _vizwiz(split: str, *, public: bool) -> tuple[Source, ...]:
    """VizWiz' own files, where its archive has them or beside the pictures."""
    url = f"{VIZWIZ}/vqa_data/Annotations.zip"
    read, train = vizwiz(public=public), vizwiz(public=True)
    return tuple(Source((f"{at}{split}.json",), read, url, (f"{at}train.json",), train) for at in ("Annotations/", ""))


def figures(base: float, chat: float, name: str = "VQA accuracy") -> dict[str, dict[str, float]]:
    """What the paper reports of both models."""
    return {BASE: {name: base}, CHAT: {name: chat}}


VQA_TRAIN = ("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json")
QUESTIONS: tuple[Benchmark, ...] = (
    Benchmark(
        name="vqav2_val",
        title="VQAv2 val",
        folder="vqav2",
        form=VQA,
        sources=(
            reference(
                "vqav2",
                "vqav2_val.jsonl",
                "v2_mscoco_val2014_annotations.json",
                read=people,
                shots="vqav2_train.jsonl",
            ),
            Source(
                ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"),
                visualqa,
                "https://visualqa.org/download.html",
                VQA_TRAIN,
            ),
        ),
        pictures=f"{COCO_PICTURES}/val2014.zip",
        size=214_354,
    ),
    Benchmark(
        name="vqav2_testdev",
        title="VQAv2 test-dev",
        folder="vqav2",
        form=VQA,
        sources=(
            reference("vqav2", "vqav2_testdev.jsonl", read=unanswered, shots="vqav2_train.jsonl"),
            Source(
                ("v2_OpenEnded_mscoco_test-dev2015_questions.json",),
                visualqa,
                "https://visualqa.org/download.html",
                VQA_TRAIN,
            ),
        ),
        pictures=f"{COCO_PICTURES}/test2015.zip",
        published=figures(79.5, 78.2),
        size=107_394,
        table=4,
    ),
    Benchmark(
        name="okvqa_val",
        title="OK-VQA",
        folder="okvqa",
        form=VQA,
        sources=(
            reference(
                "okvqa", "okvqa_val.jsonl", "mscoco_val2014_annotations.json", read=people, shots="okvqa_train.jsonl"
            ),
            Source(
                ("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json"),
                visualqa,
                "https://okvqa.allenai.org/",
                ("OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json"),
            ),
        ),
        pictures=f"{COCO_PICTURES}/val2014.zip",
        published=figures(58.6, 56.6),
        size=5046,
        table=4,
    ),
    Benchmark(
        name="textvqa_val",
        title="TextVQA",
        folder="textvqa",
        form=VQA,
        sources=(
            reference(
                "textvqa",
                "textvqa_val.jsonl",
                "textvqa_val_annotations.json",
                read=people,
                shots="textvqa_train.jsonl",
            ),
            Source(
                ("TextVQA_0.5.1_val.json",),
                textvqa,
                "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json",
                ("TextVQA_0.5.1_train.json",),
            ),
        ),
        pictures="https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
        published=figures(63.8, 61.5),
        size=5000,
        table=5,
    ),
    Benchmark(
        name="vizwiz_val",
        title="VizWiz val",
        folder="vizwiz",
        form=VQA,
        sources=(
            reference(
                "vizwiz", "vizwiz_val.jsonl", "vizwiz_val_annotations.json", read=people, shots="vizwiz_train.jsonl"
            ),
            *_vizwiz("val", public=True),
        ),
        pictures=f"{VIZWIZ}/images/val.zip",
        size=4319,
    ),
    Benchmark(
        name="vizwiz_test",
        title="VizWiz test",
        folder="vizwiz",
        form=VQA,
        sources=(
            reference("vizwiz", "vizwiz_test.jsonl", read=unanswered, shots="vizwiz_train.jsonl"),
            *_vizwiz("test", public=False),
        ),
        pictures=f"{VIZWIZ}/images/test.zip",
        published=figures(35.2, 38.9),
        size=8000,
        table=4,
        submit_as="image",
    ),
    Benchmark(
        name="gqa_testdev",
        title="GQA",
        folder="gqa",
        form=GQA,
        sources=(
            reference("gqa", "testdev_balanced.jsonl", read=answered, shots="train_balanced.jsonl"),
            Source(
                ("testdev_balanced_questions.json",),
                gqa,
                "https://downloads.cs.stanford.edu/nlp/data/gqa/questions1.2.zip",
                ("train_balanced_questions.json",),
            ),
        ),
        pictures="https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
        published=figures(59.3, 57.5, "accuracy"),
        size=12_578,
        table=4,
    ),
)
