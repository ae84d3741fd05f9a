"""Beam search and greedy decoding on table models, against transformers 4.32 and against exhaustive search."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qwenvl.errors import ConfigError, QwenVLError
from qwenvl.generation.beam import BeamOptions, Hypothesis, beam_search
from qwenvl.generation.sampling import SamplingOptions, process, sample

FOLDER = Path(__file__).parents[1] / "goldens" / "sampling"
CASES = json.loads((FOLDER / "beam_cases.json").read_text())["cases"]
BEAM_NAMES = ("num_beams", "length_penalty", "early_stopping", "num_return_sequences")


@pytest.fixture(scope="module")
def tables() -> dict[str, Tensor]:
    """The table models: logits after token t are row t."""
    tensors = load_file(FOLDER / "cases.safetensors")
    return {name: tensors[f"beam.{name}"] for name in ("M1", "M2")}


class TableModel:
    """Logits depend on the last id alone: they are its row of the table."""

    def __init__(self, table: Tensor, prompt: Tensor) -> None:
        self.table = table
        self.texts = prompt.tolist()  # plays the cache: one text per row
        self.widths: list[int] = []

    def step(self, rows: list[int], ids: Tensor) -> Tensor:
        """Reorder the rows, append the ids, return the logits after them."""
        self.texts = [[*self.texts[row], i] for row, i in zip(rows, ids.tolist(), strict=True)]
        self.widths.append(len(rows))
        return self.logits()

    def logits(self) -> Tensor:
        """After each text."""
        return self.table[[text[-1] for text in self.texts]]

    def search(self, beams: BeamOptions, options: SamplingOptions, **more: Any) -> list[list[Hypothesis]]:
        """Beam search from the prompts that this model holds."""
        prompt = torch.tensor(self.texts)
        return beam_search(self.logits(), self.step, prompt, beams, options, **more)


class WholeTextModel(TableModel):
    """Logits depend on every id of the text, so a cache row that belongs to another text gives other scores."""

    def logits(self) -> Tensor:
        """After each text."""
        return torch.stack([self.after(text) for text in self.texts])

    def after(self, text: list[int]) -> Tensor:
        """The row of the table that a polynomial in all ids picks."""
        return self.table[sum(i * (place + 1) for place, i in enumerate(text)) % len(self.table)]


def eos_ids(case: dict[str, Any]) -> list[int]:
    """The end ids of a golden case."""
    return case["eos_token_id"] if isinstance(case["eos_token_id"], list) else [case["eos_token_id"]]


def options_of(params: dict[str, Any]) -> SamplingOptions:
    """The options of a golden case that are not about beams."""
    return SamplingOptions(**{k: v for k, v in params.items() if k not in (*BEAM_NAMES, "eos_token_id")})


def as_reference(
    prompts: list[list[int]], found: list[list[Hypothesis]], width: int, eos: int, pad: int
) -> list[list[int]]:
    """The reference's layout: prompt, text, the FIRST end id whatever ended it, padding."""
    rows = []
    for prompt, texts in zip(prompts, found, strict=True):
        rows += [prompt + text.ids + [eos] * (text.stop_id is not None) for text in texts]
    return [row + [pad] * (width - len(row)) for row in rows]


@pytest.mark.parametrize("case", [c for c in CASES if c["params"]["num_beams"] > 1], ids=lambda case: case["case"])
def test_reference_beam_case(case: dict[str, Any], tables: dict[str, Tensor]) -> None:
    """Texts are those of transformers 4.32, in its order; scores agree to 1e-5."""
    params, stop_ids = case["params"], eos_ids(case)
    beams = BeamOptions(**{k: v for k, v in params.items() if k in BEAM_NAMES})
    model = TableModel(tables[case["matrix"]], torch.tensor(case["prompts"]))
    found = model.search(beams, options_of(params), stop_ids=stop_ids)
    width = len(case["sequences"][0])
    assert as_reference(case["prompts"], found, width, stop_ids[0], case["pad_token_id"]) == case["sequences"]
    scores = torch.tensor([text.score for texts in found for text in texts])
    torch.testing.assert_close(scores, torch.tensor(case["sequences_scores"]), rtol=1e-5, atol=1e-5)
    # The first token needs no step, and neither does the last if the search runs to the end.
    assert len(model.widths) == case["steps"] - 1
    assert model.widths[0] <= len(case["prompts"]) * beams.num_beams


@pytest.mark.parametrize("case", [c for c in CASES if c["params"]["num_beams"] == 1], ids=lambda case: case["case"])
def test_reference_greedy_case(case: dict[str, Any], tables: dict[str, Tensor]) -> None:
    """Argmax after the processors gives the reference's greedy texts."""
    options, stop_ids, table = options_of(case["params"]), eos_ids(case), tables[case["matrix"]]
    ids = torch.tensor(case["prompts"])
    done = torch.zeros(len(ids), dtype=torch.bool)
    for n_generated in range(case["steps"]):
        scores = process(table[ids[:, -1]], ids, options, n_generated=n_generated, stop_ids=stop_ids)
        chosen = sample(scores).masked_fill(done, case["pad_token_id"])
        done |= torch.isin(chosen, torch.tensor(stop_ids))
        ids = torch.cat([ids, chosen[:, None]], dim=1)
    assert ids.tolist() == case["sequences"]


def test_scores_are_the_log_probabilities_of_the_texts(tables: dict[str, Tensor]) -> None:
    """A score times its length is the float64 sum of log-probabilities, stop id included: the cache rows follow."""
    prompts = [[5, 9, 3], [7, 2, 11]]
    model = WholeTextModel(tables["M1"].double(), torch.tensor(prompts))
    found = model.search(BeamOptions(4, num_return_sequences=4), SamplingOptions(max_new_tokens=9), stop_ids=[0, 4])
    assert {text.stop_id for texts in found for text in texts} > {0, 4}, "no text ended by either id"
    for prompt, texts in zip(prompts, found, strict=True):
        for text in texts:
            ids = prompt + text.ids + ([] if text.stop_id is None else [text.stop_id])
            total = sum(model.after(ids[:n]).log_softmax(-1)[ids[n]].item() for n in range(3, len(ids)))
            assert text.score == pytest.approx(total / (3 + len(text.ids)), abs=1e-5)
            assert not {0, 4} & set(text.ids)


def test_a_wide_search_finds_the_best_text() -> None:
    """With as many beams as texts nothing is pruned: the result is that of trying every text."""
    table = 2 * torch.randn(5, 5, generator=torch.Generator().manual_seed(4))
    log_probs = table.log_softmax(-1)
    model = TableModel(table, torch.tensor([[2]]))
    (texts,) = model.search(BeamOptions(200, 0.0, "never", 3), SamplingOptions(max_new_tokens=3), stop_ids=[])

    def total(ids: tuple[int, ...]) -> float:
        return sum(log_probs[a, b].item() for a, b in itertools.pairwise((2, *ids)))

    best = sorted(itertools.product(range(5), repeat=3), key=total, reverse=True)[:3]
    assert [tuple(text.ids) for text in texts] == best


RAGGED = [[5, 9, 3], [11], [7, 2]]
PENALTIES = {"frequency_penalty": 0.3, "presence_penalty": 0.8}


@pytest.mark.parametrize("length_penalty", [1.0, -1.0, 2.0])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(
    "extra", [{}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 4}, PENALTIES]
)
def test_a_row_finds_what_it_would_alone(
    tables: dict[str, Tensor], length_penalty: float, early_stopping: Any, extra: dict[str, Any]
) -> None:
    """In a ragged, left-padded batch every prompt gets the texts and scores that it gets alone."""
    beams = BeamOptions(3, length_penalty, early_stopping, 3)
    options = SamplingOptions(max_new_tokens=10, **extra)
    for table in tables.values():
        padded = torch.tensor([[14] * (3 - len(ids)) + ids for ids in RAGGED])
        mask = torch.tensor([[0] * (3 - len(ids)) + [1] * len(ids) for ids in RAGGED])
        batch = TableModel(table, padded).search(beams, options, stop_ids=[0], prompt_mask=mask)
        for ids, texts in zip(RAGGED, batch, strict=True):
            assert TableModel(table, torch.tensor([ids])).search(beams, options, stop_ids=[0]) == [texts]


def table_of(n_ids: int, after: dict[int, dict[int, float]]) -> Tensor:
    """A table from probabilities; those that are not named are next to nothing."""
    table = torch.full((n_ids, n_ids), 1e-9)
    for i, following in after.items():
        for j, probability in following.items():
            table[i, j] = probability
    return table.log()


@pytest.mark.parametrize(("early_stopping", "steps", "best"), [(True, 1, []), (False, 2, []), ("never", 11, [3] * 12)])
def test_when_the_search_stops(early_stopping: Any, steps: int, best: list[int]) -> None:
    """Two texts are finished after two ids, while an unlikely beginning has a sure, long continuation.

    True stops at once; False when the open texts, at their length so far, are worse; only "never" waits for the long
    text, which the length penalty makes the best.
    """
    table = table_of(5, {2: {0: 0.68, 4: 0.3, 3: 0.02}, 4: {0: 0.95, 3: 0.05}, 3: {3: 1.0}})
    model = TableModel(table, torch.tensor([[2]]))
    (texts,) = model.search(
        BeamOptions(2, early_stopping=early_stopping), SamplingOptions(max_new_tokens=12), stop_ids=[0]
    )
    assert len(model.widths) == steps
    assert texts[0].ids == best


def test_a_stop_id_below_the_best_k_is_ignored() -> None:
    """The second stop id is third in rank: it ends no text, so one text is finished and the search goes on."""
    table = table_of(4, {2: {0: 0.4, 2: 0.3, 1: 0.2, 3: 0.1}})
    model = TableModel(table, torch.tensor([[2]]))
    (texts,) = model.search(BeamOptions(2, 0.0, True, 2), SamplingOptions(max_new_tokens=1), stop_ids=[0, 1])
    assert [(text.ids, text.stop_id) for text in texts] == [([], 0), ([2], None)]


def test_two_stop_ids_leave_enough_open_texts() -> None:
    """Every beam prefers both stop ids: three candidates per beam are needed for the search to go on."""
    table = table_of(5, {2: {3: 0.5, 4: 0.5}, 3: {0: 0.45, 1: 0.4, 3: 0.15}, 4: {0: 0.45, 1: 0.4, 3: 0.15}})
    model = TableModel(table, torch.tensor([[2]]))
    (texts,) = model.search(BeamOptions(2, 5.0), SamplingOptions(max_new_tokens=4), stop_ids=[0, 1])
    assert len(texts[0].ids) == 4


def test_rows_of_finished_prompts_are_dropped() -> None:
    """A prompt that is done costs no further steps: its rows leave the batch, and the other's rows stay its own."""
    table = torch.full((6, 6), -9.0)
    table[1, 0] = 9.0  # after 1 the text ends at once
    for i in (2, 3, 4, 5):
        table[i, 2 + (i - 1) % 4] = 9.0  # 2 -> 3 -> 4 -> 5 -> 2, and never an end
        table[i, 0] = -math.inf
    model = TableModel(table, torch.tensor([[1], [2]]))
    ended, running = model.search(BeamOptions(2, early_stopping=True), SamplingOptions(max_new_tokens=6), stop_ids=[0])
    assert ended[0].ids == []
    assert ended[0].stop_id == 0
    assert running[0] == Hypothesis([3, 4, 5, 2, 3, 4], running[0].score, None)
    assert model.widths[0] == 4
    assert model.widths[-1] == 2
    assert all(text[0] == 2 for text in model.texts)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 7])
def test_ids_the_tokenizer_lacks_are_never_emitted(tables: dict[str, Tensor], max_new_tokens: int) -> None:
    """However likely the surplus of the head is, and however few ids are left, no text holds one of it."""
    table = tables["M2"].clone()
    table[:, 3:] += 20
    for n_vocab in (1, 2, 3, 20):
        prompts = torch.tensor([[5, 9, 3], [7, 2, 11]])
        for texts in TableModel(table, prompts).search(
            BeamOptions(4, num_return_sequences=4), SamplingOptions(max_new_tokens=max_new_tokens), n_vocab=n_vocab
        ):
            assert texts
            assert len({tuple(text.ids) for text in texts}) == len(texts), "a text was found twice"
            assert all(len(text.ids) == max_new_tokens and max(text.ids) < n_vocab for text in texts)
            assert all(math.isfinite(text.score) for text in texts)


def test_only_the_stop_id_is_left() -> None:
    """Where nothing but a stop id is allowed, the text ends there instead of failing."""
    model = TableModel(torch.zeros(3, 3), torch.tensor([[2]]))
    (texts,) = model.search(BeamOptions(2, num_return_sequences=2), SamplingOptions(), stop_ids=[0], n_vocab=1)
    assert [(text.ids, text.stop_id) for text in texts] == [([], 0)]


@pytest.mark.parametrize("broken", ["nan", "forbidden"])
def test_nothing_to_choose_is_an_error(broken: str) -> None:
    """NaN logits, or every id forbidden, is one line that names the prompt, never an arbitrary text."""
    table = torch.zeros(4, 4)
    if broken == "nan":
        table[3] = math.nan
    options = SamplingOptions(no_repeat_ngram_size=1) if broken == "forbidden" else SamplingOptions()
    model = TableModel(table, torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3]]))
    with pytest.raises(QwenVLError, match=r"^row 1: no next id can be chosen[^\n]*$"):
        model.search(BeamOptions(2), options)


BAD = [
    *[{"num_beams": value} for value in (1, 0, -2, 2.0, True, "4", None)],
    *[{"length_penalty": value} for value in (math.nan, math.inf, 51, -51, True, "1", None)],
    *[{"early_stopping": value} for value in ("always", 1, None)],
    *[{"num_return_sequences": value} for value in (0, 5, 1.0, True, None)],
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_option(bad: dict[str, Any]) -> None:
    """Each option refuses what it could not honour, in one line that names it."""
    (name,) = bad
    with pytest.raises(ConfigError, match=rf"^{name} must be [^\n]*$"):
        BeamOptions(**{"num_beams": 4, **bad})
