"""What a conversation keeps: a round computes only what is new, and answers as if it had computed everything."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from support import Golden, one_line_error, random_model, small_config
from torch import Tensor

from qwenvl.errors import PromptError
from qwenvl.generation.session import CACHE_BLOCK, Session, start
from qwenvl.model.qwenvl import QwenVL

SPAN = [60, 62, 62, 62, 62, 61]
Image = tuple[str, Tensor]


@pytest.fixture
def model() -> QwenVL:
    """Random weights; boundary at 64, 1,100 positions."""
    return random_model(small_config(max_position_embeddings=1100)).requires_grad_(False)


@pytest.fixture
def columns(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many columns each call of the decoder sees."""
    seen: list[int] = []
    forward = model.decoder.forward

    def counted(embeddings: Tensor, *args: object, **more: object) -> Tensor:
        seen.append(embeddings.shape[1])
        return forward(embeddings, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(model.decoder, "forward", counted)
    return seen


@pytest.fixture
def encoded(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each call of the vision tower sees."""
    seen: list[int] = []
    encode = model.encode_images

    def counted(pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(model, "encode_images", counted)
    return seen


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """A session rewinds only where nothing differs: it never has to be warned."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def picture(number: int) -> Image:
    """A random picture and its name."""
    return f"hash{number}", torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(number))


def text(count: int, seed: int = 0) -> list[int]:
    """Ordinary ids."""
    return torch.randint(0, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def check(model: QwenVL, session: Session, ids: list[int], images: list[Image] = [], room: int = 10) -> None:  # noqa: B006
    """The session's logits for this prompt are those of a fresh forward."""
    logits = start(model, session, ids, images, room)
    pixels = torch.stack([pixels for _, pixels in images]) if images else None
    torch.testing.assert_close(logits, model(torch.tensor([ids]), pixels)[:, -1], atol=2e-5, rtol=0)
    assert session.cache is not None
    assert session.cache.host_lengths.tolist() == [len(ids)]
    assert len(session.signs) == len(ids)


def test_a_longer_prompt_computes_its_end(model: QwenVL, columns: list[int], encoded: list[int]) -> None:
    """Ids and pictures that stay are neither decoded nor encoded again."""
    session, first = Session(), [*text(5), *SPAN, *text(3)]
    check(model, session, first, [picture(1)])
    del columns[:], encoded[:]
    longer = [*first, *text(7, 1), *SPAN, *text(2)]
    start(model, session, longer, [picture(1), picture(2)], 10)
    assert (columns, encoded) == ([15], [1])
    check(model, session, longer, [picture(1), picture(2)])


def test_the_same_prompt_computes_one_column(model: QwenVL, columns: list[int], encoded: list[int]) -> None:
    """The logits behind the last token must be had anew; nothing else."""
    session, ids = Session(), [*text(5), *SPAN, *text(3)]
    start(model, session, ids, [picture(1)], 10)
    del columns[:], encoded[:]
    start(model, session, ids, [picture(1)], 10)
    assert (columns, encoded) == ([1], [])


def test_a_prompt_that_ends_in_a_picture_keeps_no_part_of_it(model: QwenVL, columns: list[int]) -> None:
    """A span is computed whole or kept whole."""
    session, ids = Session(), [*text(5), *SPAN]
    start(model, session, ids, [picture(1)], 10)
    check(model, session, [*text(5), *SPAN, *text(1)], [picture(1)])
    del columns[:]
    start(model, session, ids, [picture(1)], 10)
    assert columns == [1]  # `</img>` alone


@pytest.mark.parametrize("change", [0, 3, 5, 6, 8, 10, 11, 13])
def test_any_change_is_noticed(model: QwenVL, change: int) -> None:
    """Another id anywhere, inside a span where it does not matter too, gives what a fresh prompt gives."""
    session, ids = Session(), [*text(5), *SPAN, *text(3)]
    check(model, session, ids, [picture(1)])
    other = list(ids)
    if 5 < change < 10:
        other[change] = 3
    elif change not in (5, 10):
        other[change] = (other[change] + 1) % 60
    check(model, session, [*other, 9], [picture(1)])


def test_another_picture_under_the_same_ids_is_noticed(model: QwenVL, columns: list[int], encoded: list[int]) -> None:
    """Ids of spans are alike; what counts is the picture."""
    session, ids = Session(), [*text(5), *SPAN, *text(3), *SPAN, *text(4)]
    check(model, session, ids, [picture(1), picture(2)])
    del columns[:], encoded[:]
    start(model, session, ids, [picture(1), picture(3)], 10)
    assert (columns, encoded) == ([10], [1])
    check(model, session, ids, [picture(1), picture(3)])
    check(model, session, ids, [picture(3), picture(1)])
    check(model, session, ids, [picture(1), picture(1)])


def test_features_stay_with_their_picture(model: QwenVL, encoded: list[int]) -> None:
    """A picture that is still shown is not encoded again, even where its tokens are; one that is gone is forgotten."""
    session = Session()
    start(model, session, [*text(3), *SPAN, *SPAN], [picture(1), picture(2)], 10)
    start(model, session, [*text(3, 9), *SPAN, 5], [picture(2)], 10)
    assert encoded == [2]
    assert session.features.keys() == {"hash2"}
    check(model, session, [*SPAN, *SPAN, 5], [picture(1), picture(2)])


def test_one_picture_shown_twice_is_encoded_once(model: QwenVL, encoded: list[int]) -> None:
    """Equal pixels are one picture."""
    check(model, Session(), [*SPAN, 4, *SPAN, 5], [picture(1), picture(1)])
    assert encoded[0] == 1


def test_another_alpha_prefills_anew(model: QwenVL, columns: list[int]) -> None:
    """A prompt beyond a boundary is computed whole, from it on again only what is new, and back again whole."""
    session = Session()
    for length, expected in ((60, 60), (64, 4), (65, 65), (120, 55), (129, 129), (128, 128), (40, 40), (41, 1)):
        del columns[:]
        start(model, session, text(200)[:length], [], 5)
        assert columns == [expected]
        check(model, session, text(200)[:length])


def test_what_was_generated_is_part_of_the_prefix(model: QwenVL, columns: list[int]) -> None:
    """New ids count as far as they entered the cache: all but the last."""
    session, ids = Session(), text(20)
    start(model, session, ids, [], 10)
    assert session.cache is not None
    new = [60, 5, 61]  # tags that the model makes are ordinary
    for id_ in new[:-1]:
        model(torch.tensor([[id_]]), cache=session.cache)
    session.extend(new)
    assert len(session.signs) == 22
    del columns[:]
    start(model, session, [*ids, 5, 5, *text(4)], [], 10)
    assert columns == [6]
    check(model, session, [*ids, 5, 5, *text(4)])


def test_a_reply_beyond_a_boundary_is_not_kept(model: QwenVL) -> None:
    """Decoding past a boundary keeps the prompt's alpha; the next prompt, longer than it, has another."""
    session, ids = Session(), text(60)
    start(model, session, ids, [], 20)
    assert session.cache is not None
    for id_ in text(10, 1):
        model(torch.tensor([[id_]]), cache=session.cache)
    session.extend(text(10, 1))
    check(model, session, [*ids, *text(10, 1), *text(3, 2)])


def test_a_cache_grows_and_keeps_what_it_holds(model: QwenVL, columns: list[int]) -> None:
    """By whole blocks, and never beyond the model's positions."""
    session, ids = Session(), text(1100)
    start(model, session, ids[:300], [], 10)
    first = session.cache
    assert first is not None
    assert first.max_length == CACHE_BLOCK
    start(model, session, ids[:400], [], 10)
    assert session.cache is first
    del columns[:]
    start(model, session, ids[:510], [], 10)
    assert session.cache is not first
    assert session.cache.max_length == 2 * CACHE_BLOCK
    assert columns == [110]
    check(model, session, ids[:511])
    start(model, session, ids[:1024], [], 500)
    assert session.cache.max_length == 1100


def test_a_prompt_beyond_the_positions_is_refused(model: QwenVL) -> None:
    """With both numbers; the session is as it was."""
    session = Session()
    start(model, session, text(50), [], 10)
    with one_line_error(PromptError, 1101, 1100):
        start(model, session, text(1101), [], 10)
    check(model, session, [*text(50), 5])


@pytest.mark.parametrize("name", ["encode_images", "decoder"])
def test_a_failed_round_loses_nothing(
    model: QwenVL, monkeypatch: pytest.MonkeyPatch, columns: list[int], name: str
) -> None:
    """After an interrupt or a lack of memory in the middle, the session still says what its cache holds.

    It used to claim the whole prompt, and the next round then failed to rewind to tokens that were never computed.
    """
    session, ids = Session(), text(20)
    start(model, session, ids, [], 10)

    def fail(*_: object, **__: object) -> Tensor:
        raise KeyboardInterrupt

    longer, images = [*ids, *SPAN, *text(9)], [picture(1)]
    with monkeypatch.context() as patch:
        patch.setattr(*((model, name) if name == "encode_images" else (model.decoder, "forward")), fail)
        with pytest.raises(KeyboardInterrupt):
            start(model, session, longer, images, 10)
    del columns[:]
    start(model, session, [*longer, 5], images, 10)
    assert columns == [16]
    check(model, session, [*longer, 5], images)


@pytest.mark.parametrize("change", [lambda m: m.bfloat16(), lambda m: m.double()], ids=["bfloat16", "float64"])
def test_a_model_that_was_cast_gets_a_new_cache(model: QwenVL, change: Callable[[QwenVL], QwenVL]) -> None:
    """What was computed in another precision is dropped, instead of an error about dtypes."""
    session, ids = Session(), [*SPAN, *text(20)]
    start(model, session, ids, [picture(1)], 10)
    change(model)
    logits = start(model, session, [*ids, 5], [picture(1)], 10)
    assert session.cache is not None
    assert session.cache.keys.dtype == logits.dtype == model.decoder.wte.weight.dtype


def test_real_spans(tiny_112: Golden) -> None:
    """The golden model over several rounds, across its boundary, with two pictures."""
    session, model = Session(), tiny_112.model
    images = [(name, tiny_112.pixels[name]) for name in ("a.png", "b.png")]
    with torch.no_grad():
        check(model, session, tiny_112.prompt(9, "a.png", 30).tolist(), images[:1])
        check(model, session, tiny_112.prompt(9, "a.png", 30, "b.png", 7).tolist(), images)
        check(model, session, tiny_112.prompt(9, "a.png", 30, "b.png", 17).tolist(), images)
        check(model, session, tiny_112.prompt(9, "b.png", 30, "a.png", 17).tolist(), images[::-1])


def hidden_prompt(seed: int, count: int) -> list[int]:
    """Ordinary ids."""
    return torch.randint(0, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_weights_that_changed_are_noticed(model: QwenVL) -> None:
    """Training, or an edit in place, between two rounds once left the old keys in use, and a wrong reply."""
    session, ids = Session(), hidden_prompt(0, 30)
    start(model, session, ids, [], 8)
    model.decoder.wte.weight.mul_(-1)
    assert torch.equal(start(model, session, [*ids, 5], [], 8), start(model, Session(), [*ids, 5], [], 8))


def test_a_picture_that_fails_leaves_a_usable_session(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while encoding once left signs for tokens that the rewound cache no longer held."""
    session, ids = Session(), hidden_prompt(0, 30)
    start(model, session, ids, [], 8)
    with monkeypatch.context() as patch:
        patch.setattr(model, "encode_images", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(model, session, [*ids[:10], *SPAN, 5], [("picture", torch.zeros(3, 28, 28))], 8)
    again = start(model, session, [*ids, 5], [], 8)
    torch.testing.assert_close(again, start(model, Session(), [*ids, 5], [], 8), atol=2e-5, rtol=0)


def test_too_few_pictures(model: QwenVL) -> None:
    """A span without its picture is one line; it was a bare StopIteration."""
    with one_line_error(PromptError, "1 image spans", "0 images"):
        start(model, Session(), [5, *SPAN, 5], [], 8)
