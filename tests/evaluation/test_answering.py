"""What the engine is asked for each form of question, and what becomes of the ids that it gives."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from evaluation.asked import items

import qwenvl
from qwenvl.evaluation import forms
from qwenvl.evaluation.answering import Answer, Asker
from qwenvl.evaluation.forms import Form
from qwenvl.evaluation.journal import Journal
from qwenvl.generation.engine import Engine
from qwenvl.pipeline import Pipeline
from qwenvl.text.prompt import chatml_prompt, raw_prompt


@pytest.fixture(scope="module")
def small() -> Pipeline:
    """The embedded model with an engine of its own, and the published chat checkpoint's sampling."""
    vl = qwenvl.load("tiny", "cpu", quiet=True)
    vl.generation_config = replace(vl.generation_config, do_sample=True, top_p=0.3, top_k=0, max_new_tokens=512)
    vl.start_engine(2)
    return vl


def asker(vl: Pipeline, form: Form, seed: int = 0) -> Asker:
    """The model, asked in this form."""
    assert vl.engine is not None
    return Asker(vl, vl.engine, form, seed=seed)


def submitted(vl: Pipeline, form: Form, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> list[tuple[Any, Any]]:
    """Positional and named arguments with which the engine is asked about two items."""
    given: list[tuple[Any, Any]] = []

    def submit(_engine: Engine, *arguments: Any, **named: Any) -> Any:
        given.append((arguments, named))
        return SimpleNamespace(result=lambda: [1], losses=[0.5], finish_reason="stop")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "submit", submit)
        patch.setattr(Engine, "submit_score", submit)
        list(asker(vl, form, seed).answers(items(2, options=form.way == "losses")))
    return given


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("CAPTION", 8, 30),
        ("VQA", 1, 10),
        ("GQA", 1, 10),
        ("EXACT", 1, 10),
        ("EXACT_LONG", 1, 100),
        ("DOCUMENT", 1, 100),
        ("CHART", 1, 100),
        ("CHOICE_LETTER", 1, 10),
        ("REGION", 10, 28),
    ],
)
def test_greedy_decoding_is_the_references(
    small: Pipeline, monkeypatch: pytest.MonkeyPatch, name: str, least: int, most: int
) -> None:
    """Numbers of new tokens, greedy choice and the one id that ends an answer reach the engine, for every form."""
    form, tokenizer = getattr(forms, name), small.tokenizer
    assert tokenizer is not None
    for (ids, _, options), named in submitted(small, form, monkeypatch):
        assert (options.do_sample, options.min_new_tokens, options.max_new_tokens) == (False, least, most)
        assert options.repetition_penalty == 1
        assert named == {"stop_ids": (tokenizer.eos_id,)}
        assert tokenizer.im_start_id not in ids


def test_mme_is_sampled_as_the_checkpoint_says_with_a_seed_for_each_item(
    small: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MME's top_p takes the checkpoint's place; TouchStone keeps it; seeds are of the item and the run's seed."""
    tokenizer = small.tokenizer
    assert tokenizer is not None
    asked = submitted(small, forms.MME, monkeypatch)
    for (_, _, options), named in asked:
        assert (options.do_sample, options.top_p, options.max_new_tokens) == (True, 0.01, 512)
        assert set(named["stop_ids"]) == {tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eos_id}
    seeds = [options.seed for (_, _, options), _ in asked]
    assert len(set(seeds)) == 2
    other = submitted(small, forms.MME, monkeypatch, seed=1)
    assert not {options.seed for (_, _, options), _ in other} & set(seeds)
    assert [options.seed for (_, _, options), _ in submitted(small, forms.MME, monkeypatch)] == seeds
    assert submitted(small, forms.TOUCHSTONE, monkeypatch)[0][0][2].top_p == 0.3
    item = items(1)[0]
    query = [{"image": item.pictures[0], "numbered": False}, {"text": "\n"}, {"text": item.text}]
    n_queries = small.config.visual.n_queries
    assert asked[0][0][0] == chatml_prompt(tokenizer, query, n_queries=n_queries).ids  # type: ignore[arg-type]


def test_options_are_scored_with_the_space_before_their_letter(
    small: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses are those of " A", " B", ... behind "Answer:", one for each option, and no letter more."""
    tokenizer = small.tokenizer
    assert tokenizer is not None
    (ids, letters, _), _ = submitted(small, forms.CHOICE, monkeypatch)[0]
    assert letters == [tokenizer.encode(f" {letter}") for letter in "ABCD"]
    assert letters != [tokenizer.encode(letter) for letter in "ABCD"]
    query = forms.parts(forms.CHOICE, items(1, options=True)[0])
    assert ids == raw_prompt(tokenizer, query, n_queries=small.config.visual.n_queries).ids


def test_tags_are_part_of_a_chat_reply_alone(small: Pipeline) -> None:
    """A continuation is decoded without special ids, as the reference decodes it; a reply keeps its tags alone."""
    tokenizer = small.tokenizer
    assert tokenizer is not None
    special = tokenizer.special_ids
    ids = [special["<box>"], *tokenizer.encode("(1,2),(3,4)"), special["</box>"], *tokenizer.encode(" \n")]
    item = items(1)[0]
    for form, end, text in (
        (forms.REGION, tokenizer.eos_id, "(1,2),(3,4)"),
        (forms.MME, tokenizer.im_end_id, "<box>(1,2),(3,4)</box>"),
    ):
        for reason in ("stop", "length"):
            request: Any = SimpleNamespace(result=lambda end=end: [*ids, end], finish_reason=reason)
            assert asker(small, form)._answer(item, (), request) == Answer(item.id, text, cut=reason == "length")


def test_answers_outlive_the_process_and_an_error_never_takes_their_place(tmp_path: Path) -> None:
    """Each line is on the disk once it is added; an item that could be answered in the end has that answer."""
    journal = Journal(tmp_path)
    with journal.appending(0) as writer:
        for answer in (Answer("a", error="broken"), Answer("a", "3"), Answer("b", "4"), Answer("b", error="broken")):
            writer.add(answer)
        assert {name: one.answer for name, one in journal.answers().items()} == {"a": "3", "b": "4"}
