"""METEOR against stored output of pycocoevalcap 1.2, where it is installed; and what happens where it is not."""

import json
import sys
import time
from pathlib import Path

import pytest

from qwenvl.evaluation import meteor as module
from qwenvl.evaluation.captions import Score, score_captions
from qwenvl.evaluation.items import Item
from qwenvl.evaluation.meteor import meteor, missing
from qwenvl.evaluation.ptb import tokenize
from qwenvl.evaluation.scoring import Answered, score

CAPTIONS = json.loads((Path(__file__).parents[1] / "goldens" / "metrics" / "captions.json").read_text(encoding="utf-8"))
real = pytest.mark.skipif(missing() is not None, reason=str(missing()))
# In place of Java: counts are a sentence's words, and scores these counts over 10, and their sum.
SCORER = """
import sys
for line in sys.stdin:
    first, *parts = line.rstrip("\\n").split(" ||| ")
    if first == "SCORE":
        print(len(parts[-1].split()), "of", len(parts), flush=True)
    else:
        counts = [int(part.split()[0]) / 10 for part in parts]
        print(*counts, sum(counts), sep="\\n", flush=True)
"""
SAID, WANTED = [["a", "dog"], [""], ["a", "cat", "sits"]], [[["a", "dog"], ["dogs"]], [["x"]], [["a", "cat"]]]


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """A package whose program is this Python script."""
    program = folder / "pretended" / module.PROGRAM
    program.parent.mkdir(parents=True)
    program.write_text(script)
    java = folder / "java"
    java.write_text(f'#!/bin/sh\nexec {sys.executable} "$3"\n')  # after -jar and how much memory it may have
    java.chmod(0o755)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(module, "PACKAGE", "pretended")
    monkeypatch.setattr(module, "JAVA", str(java))


@real
def test_scores_are_the_references() -> None:
    """Protects METEOR of the corpus and of every stored picture, among which are empty captions and odd characters."""
    items = CAPTIONS["items"]
    said = [text.split(" ") for text in tokenize([item["candidate"] for item in items])]
    wanted = [[text.split(" ") for text in tokenize(item["references"])] for item in items]
    found = meteor(said, wanted)
    assert found is not None
    assert found.corpus == pytest.approx(CAPTIONS["corpus"]["METEOR"], abs=1e-4)
    assert found.images == pytest.approx([item["scores"]["METEOR"] for item in items], abs=1e-4)


@real
def test_odd_sentences_move_nobody() -> None:
    """Protects the captions after one with the program's own marks, line ends, or nothing in it."""
    odd = [["|||"], [""], ["a", "|||", "dog"], ["a\ndog"], ["a\rdog\r"], ["\ud800"], ["EVAL"], ["狗"]]
    found = meteor([*odd, ["a", "dog"]], [[["a", "dog"], ["|||"]]] * (len(odd) + 1))
    assert found is not None
    assert len(found.images) == len(odd) + 1
    assert found.images[-1] == max(found.images) == pytest.approx(1)
    assert found.images[2:5] == pytest.approx([found.images[-1]] * 3)
    assert found.images[:2] == [0, 0]


def answered() -> list[Answered]:
    """Two pictures with captions."""
    truths = {"1": ["a dog runs", "a dog"], "2": ["two cats"]}
    return [Answered(Item(name, (b"",), truth=truth), "a dog runs") for name, truth in truths.items()]


def test_without_it_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects who has not asked for it: the other figures are there, and the reason can be told."""
    monkeypatch.setattr(module, "PACKAGE", "a_package_that_nobody_has")
    assert meteor(SAID, WANTED) is None
    assert "qwenvl[meteor]" in str(missing())
    assert [one.name for one in score("captions", answered()).figures] == ["CIDEr", "BLEU-4", "ROUGE-L"]


def test_without_java_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Protects who has the package and no Java, from an error as from a wrong reason."""
    pretend(monkeypatch, tmp_path, SCORER)
    assert missing() is None
    monkeypatch.setattr(module, "JAVA", "a-command-that-nobody-has")
    assert meteor(SAID, WANTED) is None
    assert "Java" in str(missing())


def test_each_sentence_has_its_score(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Protects the order of what is asked and told, with a program that stands in for Java's."""
    pretend(monkeypatch, tmp_path, SCORER)
    assert meteor(SAID, WANTED) == Score(pytest.approx(0.5), [0.2, 0.0, 0.3])


def test_it_is_a_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Protects METEOR x 100 among the figures, with the corpus' value, and callers who have not asked for it."""
    pretend(monkeypatch, tmp_path, SCORER)
    figures = {one.name: one for one in score("captions", answered()).figures}
    assert list(figures) == ["CIDEr", "BLEU-4", "ROUGE-L", "METEOR"]
    assert figures["METEOR"].value == pytest.approx(60)
    assert "METEOR" not in score_captions({"a": "x"}, {"a": ["x"]}).corpus


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import sys; sys.exit('first\\nno memory')", "no memory"),
        ("import time; time.sleep(60)", "within 1 s"),
        ("print('not a number', flush=True); " * 9 + "input()", "not a number"),
        ("import os, sys; input(); sys.stderr.write('x' * 200_000 + '\\nlast'); sys.exit(1)", "last"),
    ],
    ids=["ends", "hangs", "talks", "complains"],
)
def test_a_failure_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, reason: str) -> None:
    """Protects the other figures from a Java that ends early, hangs or says something else; and no process is left."""
    pretend(monkeypatch, tmp_path, f"open('pid', 'w').write(str(__import__('os').getpid())); {script}")
    monkeypatch.setattr(module, "START", 1.0)
    monkeypatch.setattr(module, "EACH", 0.0)
    begun = time.monotonic()
    with pytest.warns(UserWarning, match=f"METEOR is left out: .*{reason}"):
        assert meteor(SAID, WANTED) is None
    assert time.monotonic() - begun < 20
    pid = (tmp_path / "pretended" / module.PROGRAM).with_name("pid").read_text()
    assert not Path(f"/proc/{pid}").exists()
