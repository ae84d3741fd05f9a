"""Phrases whose boxes are to be found: RefCOCO, RefCOCO+, RefCOCOg, and GRIT's referring expressions.

REGIONS           the benchmarks
read_converted    the reference's JSON lines
read_refer        the owners' refs(..).p and instances.json, one split of them
read_grit         GRIT's samples

Boxes are x1, y1, x2, y2 in pixels of a picture whose width and height stand in `more`.

GRIT publishes neither its answers nor its pictures' sizes: sizes are taken from the pictures, and only samples in the
form of its own scorer, with "input" and "output", have a truth.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from ...text.parts import shown
from ..benchmark import CONVERTED, Benchmark, Source
from ..forms import REGION
from ..items import DataError, Item, Places, Problem
from .files import (
    BrokenPicture,
    Entry,
    Malformed,
    content,
    document,
    each,
    entries,
    list_of,
    number_of,
    records,
    text_of,
)

COCO = "data/coco/train2014"  # as the reference's files have it
COCO_FOLDERS = ("train2014", "images/mscoco/images/train2014")  # where owners' archives have it
CORNERS = ("x1", "y1", "x2", "y2")


def read_converted(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:
    """Lines of {"image", "width", "height", "sent", "bbox"}; they have no ids, so their numbers stand in."""

    def make(where: str, entry: Mapping[str, Any]) -> Item:
        picture = places.picture(text_of(entry, "image"))
        return _item(where.rpartition(":")[2], picture, text_of(entry, "sent"), _box(entry), entry)

    for path in files:
        yield from each(records(path), make)


def read_refer(files: Sequence[Path], places: Places, *, split: str) -> Iterator[Item | Problem]:
    """An item for each sentence of the split; a ref's box and picture are in the file of instances."""
    refs, instances = files
    pictures, boxes = _by_id(instances, "images"), _by_id(instances, "annotations")

    def make(_: str, sentence: Mapping[str, Any]) -> Item:
        ref = sentence["ref"]
        picture, annotation = _found(pictures, ref, "image_id"), _found(boxes, ref, "ann_id")
        x, y, width, height = _box(annotation)
        place = _coco(places, text_of(picture, "file_name"))
        corners = [x, y, x + width, y + height]
        return _item(text_of(sentence, "sent_id"), place, text_of(sentence, "sent"), corners, picture)

    yield from each(_sentences(refs, split), make)


def read_grit(files: Sequence[Path], places: Places) -> Iterator[Item | Problem]:
    """Samples with an "example_id", an "image_id", which is a path, and the phrase as "task_query"."""

    def make(_: str, entry: Mapping[str, Any]) -> Item:
        asked = entry.get("input", entry)
        if not isinstance(asked, dict):
            raise Malformed(f"input should be an object, not {shown(asked)}")
        picture = places.picture(text_of(asked, "image_id"), ("images", "GRIT/images"))
        try:
            with Image.open(picture) as opened:
                more = dict(zip(("width", "height"), opened.size, strict=True))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            if os.path.isfile(picture):
                raise BrokenPicture(f"cannot read {picture}: {error}") from None
            more = {}  # that it is missing is told where all such are
        return Item(
            text_of(asked, "example_id"), (picture,), text_of(asked, "task_query"), _grit_truth(entry), more=more
        )

    for path in files:
        yield from each(entries(path), make)


def _item(name: str, picture: Path, phrase: str, box: list[float], sizes: Mapping[str, Any]) -> Item:
    more = {side: _side(sizes, side) for side in ("width", "height")}
    return Item(name, (picture,), phrase, box, more=more)


def _side(entry: Mapping[str, Any], key: str) -> int:
    length = number_of(entry, key)
    if length < 1 or not length.is_integer():
        raise Malformed(f"{key} should be pixels, not {shown(entry[key])}")
    return int(length)


def _box(entry: Mapping[str, Any]) -> list[float]:
    numbers = list_of(entry, "bbox")
    if len(numbers) != len(CORNERS):
        raise Malformed(f"bbox should be four numbers, not {shown(numbers)}")
    named = dict(zip(CORNERS, numbers, strict=True))
    return [number_of(named, corner) for corner in CORNERS]


def _grit_truth(entry: Mapping[str, Any]) -> list[float] | None:
    known = entry.get("output")
    if known is None:
        return None
    if not isinstance(known, dict):
        raise Malformed(f"output should be an object, not {shown(known)}")
    return _box({"bbox": list_of(known, "bboxes")[0]})


def _coco(places: Places, name: str) -> Path:
    """A picture of COCO's, where the reference has it or else where the owners of the phrases do."""
    first = places.picture(f"{COCO}/{name}")
    other = places.picture(name, COCO_FOLDERS)
    return other if os.path.isfile(other) and not os.path.isfile(first) else first


def _by_id(path: Path, key: str) -> dict[Any, Mapping[str, Any]]:
    """The objects in a list of a JSON file; those without an id are nobody's."""
    found = document(path)
    members = found.get(key) if isinstance(found, dict) else None
    if not isinstance(members, list):
        raise DataError(f"{path} should have a list {key!r}")
    return {one["id"]: one for one in members if isinstance(one, dict) and isinstance(one.get("id"), int)}


def _found(known: Mapping[Any, Mapping[str, Any]], ref: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    number = number_of(ref, key)
    if number not in known:
        raise Malformed(f"the instances have nothing of {key} {shown(ref[key])}")
    return known[number]


def _sentences(path: Path, split: str) -> Iterator[Entry]:
    """The sentences of a split's refs, each with its ref."""
    refs = _plain_pickle(path)
    if not isinstance(refs, list):
        raise DataError(f"{path} should be a list of refs")
    for number, ref in enumerate(refs, 1):
        where = f"{path.name} ref {number}"
        sentences = ref.get("sentences") if isinstance(ref, dict) else None
        if not isinstance(sentences, list) or not isinstance(ref.get("split"), str):
            yield where, Malformed(f"a ref is an object with a split and sentences, not {shown(ref)}")
        elif ref["split"] == split:
            for at, sentence in enumerate(sentences, 1):
                entry = sentence | {"ref": ref} if isinstance(sentence, dict) else sentence
                yield f"{where} sentence {at}", entry


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, texts and numbers: a pickle that names anything else could run what it names."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise pickle.UnpicklingError(f"it holds code, {module_name}.{global_name}, which is not run")


def _plain_pickle(path: Path) -> Any:  # noqa: ANN401 - as JSON
    stream = io.BytesIO(content(path))
    try:
        return json.loads(json.dumps(_PlainUnpickler(stream, encoding="latin1").load()))  # so it is nothing but JSON
    except Exception as error:  # what broken bytes raise is whatever they make the machine of pickles run into
        raise DataError(f"cannot read {path}: {' '.join(str(error).split()) or type(error).__name__}") from None


def _refcoco(
    name: str, folder: str, split: str, owners: str, size: int, figures: tuple[float, float], title: str
) -> Benchmark:
    converted = f"{CONVERTED}/{folder}/{name}.jsonl".replace("+", "%2B")
    return Benchmark(
        name,
        f"{title} {split}",
        folder,
        REGION,
        (
            Source((f"{name}.jsonl",), read_converted, converted),
            Source((owners, "instances.json"), partial(read_refer, split=split), "https://github.com/lichengunc/refer"),
        ),
        "http://images.cocodataset.org/zips/train2014.zip",
        {
            model: {"accuracy": figure}
            for model, figure in zip(("Qwen/Qwen-VL", "Qwen/Qwen-VL-Chat"), figures, strict=True)
        },
        size,
        table=6,
    )


REGIONS = (
    _refcoco("refcoco_val", "refcoco", "val", "refs(unc).p", 10834, (89.36, 88.55), "RefCOCO"),
    _refcoco("refcoco_testA", "refcoco", "testA", "refs(unc).p", 5657, (92.26, 92.27), "RefCOCO"),
    _refcoco("refcoco_testB", "refcoco", "testB", "refs(unc).p", 5095, (85.34, 84.51), "RefCOCO"),
    _refcoco("refcoco+_val", "refcoco+", "val", "refs(unc).p", 10758, (83.12, 82.82), "RefCOCO+"),
    _refcoco("refcoco+_testA", "refcoco+", "testA", "refs(unc).p", 5726, (88.25, 88.59), "RefCOCO+"),
    _refcoco("refcoco+_testB", "refcoco+", "testB", "refs(unc).p", 4889, (77.21, 76.79), "RefCOCO+"),
    _refcoco("refcocog_val", "refcocog", "val", "refs(umd).p", 4896, (85.58, 85.96), "RefCOCOg"),
    _refcoco("refcocog_test", "refcocog", "test", "refs(umd).p", 9602, (85.48, 86.32), "RefCOCOg"),
    Benchmark(
        "grit_refexp",
        "GRIT refexp",
        "grit",
        REGION,
        tuple(
            Source((f"{above}samples/{subset}/refexp.json",), read_grit, "https://github.com/allenai/grit_official")
            for subset in ("test", "ablation")
            for above in ("", "GRIT/")
        ),
        "https://github.com/allenai/grit_official",
        {"Qwen/Qwen-VL": {"accuracy": 78.22}},
        table=6,
    ),
)
