"""What needs no reference: however a text is cut, batched, padded or rewound, a row is what it would be alone.

Most rows lie across `seq_length` (512), where NTK alpha and log-n begin, and hold several images.
"""

import warnings

import pytest
import torch
from support import TOLERANCE, Golden, padded, random_model, small_config
from torch import Tensor

from qwenvl.model.cache import KVCache

LONG = ("a.png", 300, "b.png", 40)  # 856 tokens: alpha 3
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients() -> object:
    """None of these tests trains."""
    with torch.no_grad():
        yield


def pictures_of(golden: Golden, pieces: tuple[int | str, ...]) -> Tensor | None:
    """Pixels of the pictures among a prompt's pieces."""
    names = [piece for piece in pieces if isinstance(piece, str)]
    return golden.pictures(*names) if names else None


def near(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal shapes, and no element further apart than the tolerance."""
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def test_the_long_prompt_needs_its_alpha(tiny_112: Golden) -> None:
    """Guards the tests below: under another alpha, and with the pictures swapped, the logits are far away."""
    ids = tiny_112.prompt(*LONG)[None]
    pixels = pictures_of(tiny_112, LONG)
    logits = tiny_112.model(ids, pixels)
    near(tiny_112.model(ids, pixels, ntk_alpha=3), logits)
    assert (tiny_112.model(ids, pixels, ntk_alpha=1) - logits).abs().max() > 0.1
    assert (tiny_112.model(ids, pixels.flip(0)) - logits).abs().max() > 0.1


# --- cached = uncached ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[856], [1, 855], [400, 456], [512, 1, 1, 342], [300, 300, 256], [600] + [1] * 256])
def test_chunked_prefill_is_the_whole(tiny_112: Golden, chunks: list[int]) -> None:
    """A declared prompt gives the same logits in any chunks, cut anywhere, images and boundary included."""
    model, ids = tiny_112.model, tiny_112.prompt(*LONG)[None]
    pixels = pictures_of(tiny_112, LONG)
    whole = model(ids, pixels)
    embeddings = model.embed(ids, pixels)
    cache = KVCache.allocate(model.config, 1, 900)
    cache.declare([856])
    parts = [model(None, embeddings=part, cache=cache) for part in embeddings.split(chunks, dim=1)]
    near(torch.cat(parts, dim=1), whole)
    assert cache.host_lengths.tolist() == cache.lengths.tolist() == [856]
    assert cache.alphas.tolist() == [3]


def test_chunks_of_ids_take_their_own_images(tiny_112: Golden) -> None:
    """A later chunk's `<img>` spans are filled if images are given with it."""
    model, ids = tiny_112.model, tiny_112.prompt(*LONG)[None]
    cache = KVCache.allocate(model.config, 1, 856)
    cache.declare([856])
    first = model(ids[:, :500], tiny_112.pictures("a.png"), cache=cache)
    second = model(ids[:, 500:], tiny_112.pictures("b.png"), cache=cache)
    near(torch.cat((first, second), dim=1), model(ids, pictures_of(tiny_112, LONG)))


def test_an_undeclared_first_chunk_fixes_alpha(tiny_112: Golden) -> None:
    """Without `declare`, alpha is that of the first forward's length, and stays."""
    model, ids = tiny_112.model, tiny_112.prompt(700)[None]
    cache = KVCache.allocate(model.config, 1, 700)
    parts = [model(part, cache=cache) for part in ids.split([100, 600], dim=1)]
    near(torch.cat(parts, dim=1), model(ids, ntk_alpha=1))


def test_alpha_is_kept_while_decoding_past_a_boundary(tiny_112: Golden) -> None:
    """A prompt of 510 tokens keeps alpha 1 at 600 tokens, where an uncached text would have 3."""
    model, ids = tiny_112.model, tiny_112.prompt(600)[None]
    cache = KVCache.allocate(model.config, 1, 600)
    parts = [model(ids[:, :510], cache=cache)] + [model(ids[:, at : at + 1], cache=cache) for at in range(510, 600)]
    logits = torch.cat(parts, dim=1)
    near(logits, model(ids, ntk_alpha=1))
    assert (logits - model(ids)).abs().max() > 0.1


RAGGED: list[tuple[int | str, ...]] = [
    ("a.png", 20, "b.png", 10),  # 546: just behind the boundary
    (7,),
    (200, "a.png", 40),  # 498: before it
    (250, "b.png", 300, "a.png", 300),  # 1366: alpha 7
    (1,),
]


def ragged(golden: Golden, sides: str | list[str]) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The rows above alone; as a batch with its mask; all pictures."""
    rows = [golden.prompt(*pieces, seed=row) for row, pieces in enumerate(RAGGED)]
    names = [piece for pieces in RAGGED for piece in pieces if isinstance(piece, str)]
    return rows, *padded(rows, sides), golden.pictures(*names)


@pytest.mark.parametrize("sides", ["left", "right", "both", ["left", "right", "both", "left", "right"]], ids=str)
def test_a_row_in_a_batch_is_the_row_alone(golden: Golden, sides: str | list[str]) -> None:
    """Padding anywhere, other rows of any length, alpha and number of images: no real position changes."""
    rows, ids, mask, pixels = ragged(golden, sides)
    logits = golden.model(ids, pixels, attention_mask=mask)
    assert logits.isfinite().all()
    for row, (alone, pieces) in enumerate(zip(rows, RAGGED, strict=True)):
        near(logits[row][mask[row]], golden.model(alone[None], pictures_of(golden, pieces))[0])


def test_holes_in_a_row_are_padding_too(tiny_112: Golden) -> None:
    """Padding may stand between the tokens: it takes no position."""
    row = tiny_112.prompt(30)
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[0, [3, 4, 10, 17, 18, 19, 20, 30, 31, 39]] = False
    ids = torch.full((1, 40), 5)
    ids[mask] = row
    near(tiny_112.model(ids, attention_mask=mask)[mask], tiny_112.model(row[None])[0])


@pytest.mark.parametrize("sides", ["left", "right", ["left", "right", "both", "left", "right"]], ids=str)
def test_ragged_rows_decode_as_alone(tiny_112: Golden, sides: str | list[str]) -> None:
    """Prefilled together and stepped together, chunk after chunk, each row is its uncached text under its own alpha."""
    model = tiny_112.model
    rows, ids, mask, pixels = ragged(tiny_112, sides)
    cache = KVCache.allocate(model.config, 5, 1500)
    first = model(ids, pixels, attention_mask=mask, cache=cache)
    assert cache.alphas.tolist() == [3, 1, 1, 7, 1]
    assert cache.lengths.tolist() == cache.host_lengths.tolist() == [len(row) for row in rows]
    more = torch.randint(3, 300, (5, 25), generator=torch.Generator().manual_seed(9))
    parts = [model(part, cache=cache) for part in more.split([1, 1, 7, 1, 15], dim=1)]
    for row, pieces in enumerate(RAGGED):
        text = torch.cat((rows[row], more[row]))[None]
        alone = model(text, pictures_of(tiny_112, pieces), ntk_alpha=cache.alphas[row].item())[0]
        near(torch.cat((first[row][mask[row]], torch.cat(parts, 1)[row])), alone)


def test_later_chunks_may_be_ragged(tiny_112: Golden) -> None:
    """Rows of different lengths get different numbers of new tokens in one call, none among them, on either side."""
    model = tiny_112.model
    starts = [tiny_112.prompt(n, seed=n) for n in (520, 3, 40)]
    news = [tiny_112.prompt(n, seed=n) for n in (2, 500, 1)]
    cache = KVCache.allocate(model.config, 3, 1200)
    ids, mask = padded(starts)
    model(ids, attention_mask=mask, cache=cache)
    ids, mask = padded(news, ["right", "left", "left"])
    mask[2] = False  # this row waits
    second = model(ids, attention_mask=mask, cache=cache)
    assert cache.lengths.tolist() == [522, 503, 40]
    last = model(torch.tensor([[5], [6], [7]]), cache=cache)
    for row in range(3):
        real = news[row] if row < 2 else news[row][:0]
        text = torch.cat((starts[row], real, torch.tensor([row + 5])))[None]
        alone = model(text, ntk_alpha=cache.alphas[row].item())[0, len(starts[row]) :]
        near(torch.cat((second[row][mask[row]], last[row])), alone)


# --- rewinding ------------------------------------------------------------------------------------------------------


def test_rewind_then_continue_is_uncached(tiny_112: Golden) -> None:
    """After a rewind, each row to its own prefix, what follows is the uncached text under the row's alpha."""
    model = tiny_112.model
    starts = [tiny_112.prompt(n, seed=n) for n in (900, 600)]
    ids, mask = padded(starts)
    cache = KVCache.allocate(model.config, 2, 1100)
    model(ids, attention_mask=mask, cache=cache)
    cache.rewind([700, 550])
    more = torch.randint(3, 300, (2, 30), generator=torch.Generator().manual_seed(1))
    second = torch.cat([model(part, cache=cache) for part in more.split([1, 20, 9], dim=1)], dim=1)
    assert cache.lengths.tolist() == cache.host_lengths.tolist() == [730, 580]
    for row, kept in enumerate((700, 550)):
        text = torch.cat((starts[row][:kept], more[row]))[None]
        near(second[row], model(text, ntk_alpha=3)[0, kept:])


def test_rewind_below_a_boundary_says_so_and_keeps_alpha(tiny_112: Golden) -> None:
    """900 tokens rewound to 300 keep alpha 3: a warning of one line, and what follows is uncached under 3, not 1."""
    model, ids = tiny_112.model, tiny_112.prompt(900)[None]
    cache = KVCache.allocate(model.config, 1, 900)
    model(ids, cache=cache)
    with pytest.warns(UserWarning, match="keeps NTK alpha 3 after a rewind to 300 tokens") as told:
        cache.rewind([300])
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    assert "alpha 1;" in str(told[0].message)
    near(model(ids[:, 300:400], cache=cache), model(ids[:, :400], ntk_alpha=3)[:, 300:])


def test_rewind_to_nothing_forgets_alpha(tiny_112: Golden) -> None:
    """An emptied row takes the next prompt as if it were new; the other row is not touched."""
    model = tiny_112.model
    ids = torch.stack([tiny_112.prompt(600, seed=1), tiny_112.prompt(600, seed=2)])
    cache = KVCache.allocate(model.config, 2, 700)
    model(ids, cache=cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.rewind([0, 600])
    short = tiny_112.prompt(50, seed=3)
    batch, mask = padded([short, ids[1, :1]])
    both = model(batch, attention_mask=mask, cache=cache)
    near(both[0], model(short[None])[0])
    near(both[1][mask[1]], model(torch.cat((ids[1], ids[1, :1]))[None])[0, -1:])


def test_what_lies_beyond_a_rows_length_is_invisible(tiny_112: Golden) -> None:
    """Whatever a rewound or padded row's later slots hold, no logit depends on it."""
    model = tiny_112.model
    starts = [tiny_112.prompt(n, seed=n) for n in (600, 20)]
    ids, mask = padded(starts, "right")
    outputs = []
    for garbage in (0.0, 1e4):
        cache = KVCache.allocate(model.config, 2, 700)
        model(ids, attention_mask=mask, cache=cache)
        cache.rewind([590, 15])
        for row, length in enumerate((590, 15)):
            cache.keys[:, row, :, length:] = garbage
            cache.values[:, row, :, length:] = -garbage
        outputs.append(torch.cat([model(part, cache=cache) for part in ids[:, :20].split([1, 12, 1, 6], 1)], dim=1))
    assert torch.equal(*outputs)


# --- images ---------------------------------------------------------------------------------------------------------


def test_an_image_touches_its_own_row_alone(tiny_112: Golden) -> None:
    """Another picture in row 0 changes row 0 from its span on, and not one bit of row 1."""
    rows = [tiny_112.prompt(10, "a.png", 20, seed=1), tiny_112.prompt(100, "b.png", 5, seed=2)]
    ids, mask = padded(rows)
    one = tiny_112.model(ids, tiny_112.pictures("a.png", "b.png"), attention_mask=mask)
    other = tiny_112.model(ids, tiny_112.pictures("c.png", "b.png"), attention_mask=mask)
    assert torch.equal(one[1], other[1])
    real_one, real_other = one[0][mask[0]], other[0][mask[0]]
    assert torch.equal(real_one[:11], real_other[:11])
    assert (real_one[11:] - real_other[11:]).abs().max() > 0.1


def test_images_fill_the_spans_in_reading_order(tiny_112: Golden) -> None:
    """Row by row, left to right, wherever padding puts the spans."""
    model, pieces = tiny_112.model, [("a.png", 5, "b.png", 4), (3, "c.png", 2)]
    rows = [tiny_112.prompt(*row, seed=i) for i, row in enumerate(pieces)]
    ids, mask = padded(rows)
    embeddings = model.embed(ids, tiny_112.pictures("a.png", "b.png", "c.png"), attention_mask=mask)
    features = model.encode_images(tiny_112.pictures("a.png", "b.png", "c.png"))
    first, second = embeddings[0][mask[0]], embeddings[1][mask[1]]
    assert torch.equal(first[1:257], features[0])
    assert torch.equal(first[264:520], features[1])
    assert torch.equal(second[4:260], features[2])
    table = model.decoder.wte.weight  # and nothing but the spans' insides is replaced
    outside = torch.cat((torch.arange(1), torch.arange(257, 264), torch.arange(520, 525)))
    assert torch.equal(first[outside], table[rows[0][outside]])


@pytest.mark.parametrize("inside", [0, 300, 301, 302, 17])
def test_ids_inside_a_span_do_not_matter(tiny_112: Golden, inside: int) -> None:
    """The reference writes the image's path there; even the ids of the tags themselves are only room."""
    ids = tiny_112.prompt(5, "a.png", 20, "b.png", 8)[None]
    pixels = tiny_112.pictures("a.png", "b.png")
    changed = ids.clone()
    changed[0, 6:262] = inside
    changed[0, 284:540] = inside
    assert torch.equal(tiny_112.model(changed, pixels), tiny_112.model(ids, pixels))


def test_a_stray_end_tag_is_an_ordinary_id(tiny_112: Golden) -> None:
    """`</img>` and `<imgpad>` outside a span stand for their own embeddings."""
    model = tiny_112.model
    ids = torch.cat((torch.tensor([301, 302]), tiny_112.prompt(3, "a.png", 4), torch.tensor([301, 9])))[None]
    embeddings = model.embed(ids, tiny_112.pictures("a.png"))
    assert torch.equal(embeddings[0, [0, 1, -2]], model.decoder.wte.weight[[301, 302, 301]])
    model(ids, tiny_112.pictures("a.png"))


def test_generated_tags_are_ordinary_ids(tiny_112: Golden) -> None:
    """Behind a prompt, `<img>` starts no span: alone, in a longer chunk, and as the last of a text."""
    model, prompt = tiny_112.model, tiny_112.prompt("a.png", 20)[None]
    cache = KVCache.allocate(model.config, 1, 400)
    model(prompt, tiny_112.pictures("a.png"), cache=cache)
    new = torch.tensor([[300, 300, 5, 301, 302, 300]])
    parts = [model(part, cache=cache) for part in new.split([1, 1, 4], dim=1)]
    embeddings = torch.cat((model.embed(prompt, tiny_112.pictures("a.png")), model.decoder.wte(new)), dim=1)
    near(torch.cat(parts, 1), model(None, embeddings=embeddings)[:, -6:])


def test_tags_in_padding_are_padding(tiny_112: Golden) -> None:
    """An id that happens to be `<img>` in a padded column opens no span."""
    row = tiny_112.prompt(12)
    ids, mask = padded([row, row[:7]], pad_id=300)
    near(tiny_112.model(ids, attention_mask=mask)[1][mask[1]], tiny_112.model(row[None, :7])[0])


# --- odd rows, modes and dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("hooks", [False, True])
def test_a_fully_padded_row_makes_no_nan(tiny_112: Golden, cached: bool, hooks: bool) -> None:
    """It has no meaning, but it is finite, and the row beside it is what it is alone; then both can go on."""
    model, row = tiny_112.model, tiny_112.prompt(600)
    ids = torch.stack((torch.zeros_like(row), row))
    mask = torch.tensor([[False], [True]]).expand(2, 600)
    cache = KVCache.allocate(model.config, 2, 610) if cached else None
    output = model(ids, attention_mask=mask, cache=cache, return_attentions=hooks)
    logits = output.logits if hooks else output
    assert logits.isfinite().all()
    near(logits[1], model(row[None])[0])
    if cache is not None:
        assert cache.lengths.tolist() == [0, 600]
        step = model(torch.tensor([[7], [7]]), cache=cache)
        near(step[0], model(torch.tensor([[7]]))[0])
        near(step[1:], model(torch.cat((row, torch.tensor([7])))[None])[:, -1:])


def test_training_mode_knows_neither_ntk_nor_logn() -> None:
    """In training mode a text beyond `seq_length` is rotated and scaled as a short one; eval mode differs."""
    config = small_config()
    model = random_model(config)
    plain = random_model(small_config(use_dynamic_ntk=False, use_logn_attn=False))
    ids = torch.randint(0, 60, (1, 200), generator=torch.Generator().manual_seed(0))
    near(model.train()(ids), plain(ids))
    cache = KVCache.allocate(config, 1, 200)
    near(torch.cat([model(part, cache=cache) for part in ids.split([150, 50], 1)], 1), plain(ids))
    assert (model.eval()(ids) - plain(ids)).abs().max() > 0.01


def test_dynamic_ntk_can_be_off() -> None:
    """`use_dynamic_ntk: false` keeps alpha 1 at any length, cached or not, and leaves log-n alone."""
    ids = torch.randint(0, 60, (1, 200), generator=torch.Generator().manual_seed(0))
    config = small_config(use_dynamic_ntk=False)
    model = random_model(config)
    near(model(ids), random_model(small_config())(ids, ntk_alpha=1))
    cache = KVCache.allocate(config, 1, 200)
    near(model(ids, cache=cache), model(ids))
    assert cache.alphas.tolist() == [1]


def test_logn_can_be_off() -> None:
    """`use_logn_attn: false` changes nothing up to `seq_length` and everything behind it."""
    ids = torch.randint(0, 60, (1, 200), generator=torch.Generator().manual_seed(0))
    both, without = random_model(small_config())(ids), random_model(small_config(use_logn_attn=False))(ids)
    near(both[:, :64], without[:, :64])
    assert ((both - without)[:, 64:].abs().amax(-1) > 0).all()
    assert (both - without).abs().max() > 0.01


def test_ntk_alpha_of_each_row() -> None:
    """One alpha for all or one a row; each row computes what it computes under its own."""
    model = random_model(small_config())
    ids = torch.randint(0, 60, (3, 30), generator=torch.Generator().manual_seed(0))
    together = model(ids, ntk_alpha=[1, 3, 7.5])
    for row, alpha in enumerate([1, 3, 7.5]):
        near(together[row], model(ids[row : row + 1], ntk_alpha=alpha)[0])
    assert (model(ids, ntk_alpha=3)[0] - together[0]).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_cache(dtype: torch.dtype) -> None:
    """A model in 16 bits decodes with a cache of its own dtype, near what it computes uncached."""
    model = random_model(small_config()).to(dtype)
    ids = torch.randint(0, 60, (2, 90), generator=torch.Generator().manual_seed(0))
    cache = KVCache.allocate(model.config, 2, 90, dtype)
    parts = [model(part, cache=cache) for part in ids.split([70, 1, 19], dim=1)]
    assert cache.keys.dtype == parts[0].dtype == dtype
    whole = model(ids, ntk_alpha=cache.alphas.tolist())
    difference = (torch.cat(parts, 1).float() - whole.float()).norm() / whole.float().norm()
    assert difference < (2e-2 if dtype == torch.bfloat16 else 3e-3)


def test_forward_leaves_nothing_behind() -> None:
    """No state outlives a call: the same input after other calls, modes and caches gives the same bits."""
    model = random_model(small_config())
    ids = torch.randint(0, 60, (2, 100), generator=torch.Generator().manual_seed(0))
    names = [name for name, _ in model.named_buffers()]
    before = model(ids)
    model(ids[:, :3], cache=KVCache.allocate(model.config, 2, 3))
    model.train()(ids[:1], return_hidden=True, return_attentions=True)
    model.eval()(ids, ntk_alpha=31)
    assert torch.equal(model(ids), before)
    assert [name for name, _ in model.named_buffers()] == names
