"""Conversations: the reference's ids and labels, every bad record told at once, broken pictures as chosen."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import chat_config, one_line_error, write_vocabulary

from qwenvl.config import QwenVLConfig
from qwenvl.errors import ConfigError
from qwenvl.image import preprocess
from qwenvl.text.prompt import training_example
from qwenvl.text.tokenizer import Tokenizer
from qwenvl.training.batches import collate
from qwenvl.training.data import ConversationDataset
from qwenvl.training.errors import DataError
from qwenvl.training.loader import batches


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small vocabulary."""
    return Tokenizer(write_vocabulary(tmp_path_factory.mktemp("vocabulary")))


@pytest.fixture(scope="module")
def config(tokenizer: Tokenizer) -> QwenVLConfig:
    """Spans of 16 in texts of at most 1024."""
    return chat_config(tokenizer)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two pictures and one that is none."""
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return tmp_path


def talk(question: str, answer: str | None = "the dog") -> dict[str, Any]:
    """A record of one exchange, or of a question alone."""
    messages = [{"from": "user", "value": question}]
    return {"conversations": messages + ([] if answer is None else [{"from": "assistant", "value": answer}])}


def write(path: Path, records: list[Any]) -> Path:
    """A list, or lines for `.jsonl`, where a str is written as it is."""
    if path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


GOOD = [talk("<img>a.png</img>what is this"), talk("where is the cat"), talk("<img>b.png</img><img>a.png</img>what")]


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_samples(name: str, folder: Path, tokenizer: Tokenizer, config: QwenVLConfig) -> None:
    """A list and lines give the same: ids and labels of `training_example`, pixels in order, lengths, a source."""
    dataset = ConversationDataset(write(folder / name, GOOD), tokenizer, config, quiet=True)
    assert len(dataset) == 3
    for index, record in enumerate(GOOD):
        expected = training_example(tokenizer, record["conversations"], 2048 // 2, n_queries=16)
        sample = dataset[index]
        assert (sample.ids, sample.labels) == (expected.ids, expected.labels)
        assert dataset.lengths[index] == len(sample.ids)
    assert dataset[1].pixels is None
    pixels = dataset[2].pixels
    assert pixels is not None
    assert torch.equal(pixels, torch.stack([preprocess(folder / f"{name}.png", 56) for name in "ba"]))
    assert dataset[2].source == ("train.jsonl:3" if name == "train.jsonl" else "train.json record 3")


@pytest.mark.real
def test_labels_are_the_references(reference_dir: Path, goldens: Path, tmp_path: Path, config: QwenVLConfig) -> None:
    """Ids and labels of the reference's own fine-tuning code, before it pads."""
    real = Tokenizer(reference_dir / "hf")
    sizes = {
        "vocab_size": real.n_vocab,
        "visual": {**config.to_dict()["visual"], "image_start_id": real.image_start_id, "n_queries": 256},
    }
    config = QwenVLConfig.from_dict({**config.to_dict(), **sizes})
    Image.new("RGB", (8, 8)).save(tmp_path / "demo.jpeg")
    rows = json.loads((goldens / "tokenizer" / "cases.json").read_text(encoding="utf-8"))["sft_preprocess"]
    for row in rows[1:]:  # the first is cut within a picture
        path = write(tmp_path / "train.json", [{"conversations": row["conversations"]}])
        sample = ConversationDataset(path, real, config, max_length=row["max_len"], quiet=True)[0]
        padding = row["max_len"] - len(sample.ids)
        assert sample.labels + [-100] * padding == row["labels"]
        assert sample.ids + [real.eos_id] * padding == row["input_ids"]


BAD = {
    "not JSON": ('{"conversations": ', "not JSON"),
    "a number": ("7", "a record is an object"),
    "no conversations": ({"id": "x"}, "conversations must be a list"),
    "a text": ({"conversations": "hi"}, "conversations must be a list"),
    "empty": ({"conversations": []}, "no message from a user"),
    "a system": ({"conversations": [{"from": "system", "value": "x"}]}, "message 1 must have 'from'"),
    "no value": ({"conversations": [{"from": "user"}]}, "message 1 must have a text"),
    "no reply": (talk("what", None), "nothing can be learned"),
    "empty reply": (talk("what", ""), "nothing can be learned"),
    "no picture": (talk("<img>gone.png</img>what"), "there is no picture"),
    "a folder": (talk("<img>.</img>what"), "there is no picture"),
    "a URL": (talk("<img>https://example.org/a.png</img>what"), "download"),
    "an open picture": (talk("<img>a.png what"), "a picture is written"),
    "a nameless picture": (talk("<img></img>what"), "a picture is written"),
    "a stray end": (talk("a.png</img>what"), "a picture is written"),
    "cut picture": (talk("<img>a.png</img>" * 5), "ends within a picture"),
    "cut reply": (talk("what " * 60), "nothing can be learned"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records(
    name: str, folder: Path, tokenizer: Tokenizer, config: QwenVLConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is fatal with its line and reason, or skipped with the same words."""
    record, reason = BAD[name]
    path = write(folder / "train.jsonl", ["", GOOD[1], record, GOOD[1]])
    with one_line_error(DataError, "train.jsonl:3", reason, "1 of 3 records"):
        ConversationDataset(path, tokenizer, config, max_length=64, quiet=True)
    dataset = ConversationDataset(path, tokenizer, config, max_length=64, on_error="skip")
    assert (len(dataset), len(dataset.bad)) == (2, 1)
    assert dataset[1].source == "train.jsonl:4"
    told = capsys.readouterr().err
    assert dataset.bad[0] in told
    assert reason in told


def test_all_bad_records_are_told(
    folder: Path, tokenizer: Tokenizer, config: QwenVLConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line quotes the first few and counts them all; the error has every one, and a list is printed above it."""
    path = write(folder / "train.json", [{"id": f"n{number}"} for number in range(5)] + GOOD)
    with pytest.raises(DataError) as caught:
        ConversationDataset(path, tokenizer, config, quiet=True)
    assert "5 of 8 records" in str(caught.value)
    assert "train.json record 3 ('n2')" in str(caught.value)
    assert "n3" not in str(caught.value)
    assert [line.partition(":")[0] for line in caught.value.bad] == [
        f"train.json record {number} ('n{number - 1}')" for number in range(1, 6)
    ]
    capsys.readouterr()
    for choice in ("fatal", "skip"):
        with contextlib.suppress(DataError):
            ConversationDataset(path, tokenizer, config, on_error=choice)  # type: ignore[arg-type]
        printed = capsys.readouterr().err
        assert all(line in printed for line in caught.value.bad)
    write(path, [{"id": f"n{number}"} for number in range(105)] + GOOD)
    ConversationDataset(path, tokenizer, config, on_error="skip")
    printed = capsys.readouterr().err
    assert "... and 5 more" in printed
    assert "n99" in printed
    assert "n100" not in printed


def test_one_object_over_several_lines(folder: Path, tokenizer: Tokenizer, config: QwenVLConfig) -> None:
    """As an editor writes it: one record, told by its id."""
    path = folder / "one.json"
    path.write_text(json.dumps({"id": "only"} | GOOD[0], indent=2))
    dataset = ConversationDataset(path, tokenizer, config, quiet=True)
    assert (len(dataset), dataset[0].source) == (1, "one.json:1 ('only')")


@pytest.mark.parametrize(
    ("content", "says"), [("", "no record"), ("[]", "no record"), ("[1,", "not valid JSON"), ('["x"]', "1 of 1")]
)
def test_no_data(content: str, says: str, tmp_path: Path, tokenizer: Tokenizer, config: QwenVLConfig) -> None:
    """Nothing that could be skipped to is an error, whatever the choice."""
    path = tmp_path / "train.json"
    path.write_text(content)
    with one_line_error(DataError, "train.json", says):
        ConversationDataset(path, tokenizer, config, on_error="skip", quiet=True)
    with one_line_error(DataError, "cannot read", "gone.json"):
        ConversationDataset(tmp_path / "gone.json", tokenizer, config, quiet=True)


def test_files_of_windows(folder: Path, tokenizer: Tokenizer, config: QwenVLConfig) -> None:
    """A byte order mark and CRLF are not part of the data."""
    lines, table = folder / "train.jsonl", folder / "train.json"
    lines.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(record).encode() for record in GOOD) + b"\r\n")
    table.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    for path in (lines, table):
        assert len(ConversationDataset(path, tokenizer, config, quiet=True)) == 3


def test_image_root(folder: Path, tokenizer: Tokenizer, config: QwenVLConfig) -> None:
    """Relative paths begin at the data file's folder, or where the caller says; absolute ones stay."""
    (folder / "data").mkdir()
    records = [talk(f"<img>{folder / 'b.png'}</img>what"), GOOD[0]]
    path = write(folder / "data" / "train.json", records)
    with one_line_error(DataError, "record 2", "no picture"):
        ConversationDataset(path, tokenizer, config, quiet=True)
    assert len(ConversationDataset(path, tokenizer, config, image_root=folder, quiet=True)) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_pictures(
    workers: int, folder: Path, tokenizer: Tokenizer, config: QwenVLConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    """Found when it is decoded: one line that names the record, also out of a worker, or the next good one instead."""
    broken = talk("<img>broken.png</img>what")
    path = write(folder / "train.jsonl", [GOOD[0], broken, broken, GOOD[1]])
    dataset = ConversationDataset(path, tokenizer, config, quiet=True)
    with one_line_error(DataError, "train.jsonl:2", "not a picture"):
        list(batches(dataset, collate, [[0], [0, 1]], workers))
    dataset = ConversationDataset(path, tokenizer, config, on_error="skip", quiet=True)
    (batch,) = batches(dataset, collate, [[1, 0]], workers)
    assert batch.sources == ["train.jsonl:4", "train.jsonl:1"]
    told = capfd.readouterr().err
    assert "train.jsonl:2" in told
    assert "train.jsonl:3" in told
    if workers == 0:
        assert dataset[1].source == "train.jsonl:4"
        assert capfd.readouterr().err == ""  # told once
    dataset = ConversationDataset(write(path, [broken]), tokenizer, config, on_error="skip", quiet=True)
    with one_line_error(DataError, "no record has pictures that can be read"):
        dataset[0]


def test_long_conversations_are_cut(folder: Path, tokenizer: Tokenizer, config: QwenVLConfig) -> None:
    """To `max_length`, as the reference cuts them, if a part of a reply is left."""
    path = write(folder / "train.json", [talk("what", "the dog " * 100)])
    assert ConversationDataset(path, tokenizer, config, max_length=64, quiet=True).lengths == [64]


def test_arguments_that_do_not_fit(folder: Path, tokenizer: Tokenizer, config: QwenVLConfig) -> None:
    """A length beyond the model's, an unknown choice, another model's tokenizer."""
    path = write(folder / "train.json", GOOD)
    with one_line_error(ConfigError, "max_length", "1024", "1025"):
        ConversationDataset(path, tokenizer, config, max_length=1025)
    with one_line_error(ConfigError, "on_error", "'ignore'"):
        ConversationDataset(path, tokenizer, config, on_error="ignore")  # type: ignore[arg-type]
    other = QwenVLConfig.from_dict({**config.to_dict(), "visual": {**config.to_dict()["visual"], "image_start_id": 5}})
    with one_line_error(ConfigError, "<img>", "image_start_id"):
        ConversationDataset(path, tokenizer, other)


def test_the_fingerprint_is_of_the_content(folder: Path, tokenizer: Tokenizer, config: QwenVLConfig) -> None:
    """Of texts and pictures, wherever the file stands and however it is laid out, so that a run can tell its data."""

    def fingerprint(name: str, *records: dict[str, Any]) -> str:
        return ConversationDataset(write(folder / name, list(records)), tokenizer, config, quiet=True).fingerprint

    one, other = talk("<img>a.png</img>What?"), talk("Why?")
    known = fingerprint("data.json", one, other)
    assert fingerprint("lines.jsonl", one, other) == known
    changed = [(other, one), (one,), (one, talk("How?")), (talk("<img>b.png</img>What?"), other)]
    assert len({known, *(fingerprint("data.json", *records) for records in changed)}) == 5
