"""Layers split over devices: the same bits, each tensor where its layer is, and nothing for the caller to move.

There is no GPU here: numbers are compared with layers split over "two" CPUs, which is the same code, and devices are
checked with pretended ones, which raise when an operation mixes them.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_layers import packed_tensors
from pretended_devices import MixedDevices, PretendedDevices, put
from safetensors.torch import save_file
from support import Golden, one_line_error, padded, random_model, small_config
from torch import Tensor

import qwenvl
from qwenvl import loading
from qwenvl.adapt import layers
from qwenvl.adapt.adapters import save_adapter
from qwenvl.adapt.capture import Stepper
from qwenvl.adapt.layers import LayerSplit, layer_counts
from qwenvl.adapt.lora import LoraOptions, add_lora, lora_layers
from qwenvl.config import QuantizationConfig
from qwenvl.errors import CacheError, ConfigError
from qwenvl.generation import room
from qwenvl.model.cache import KVCache
from qwenvl.model.qwenvl import Output
from qwenvl.pipeline import Pipeline
from qwenvl.weights.keymap import entries

CPU = torch.device("cpu")
GPUS = [torch.device("cuda:0"), torch.device("cuda:1")]
PICTURE = Path(__file__).parents[2] / "docs" / "patches.png"


def load_split(folder: Path | str, monkeypatch: pytest.MonkeyPatch, counts: list[int], **options: Any) -> Pipeline:
    """A checkpoint whose layers are split over as many CPUs as there are counts."""
    monkeypatch.setattr(loading, "layer_counts", lambda *_: counts)
    device = ",".join(["cpu"] * len(counts))
    return qwenvl.load(folder, device, "float32", parallel="layers", quiet=True, **options)


@pytest.fixture(params=[[1, 2], [0, 3], [1, 1, 1]], ids=str)
def split(request: pytest.FixtureRequest, goldens: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """The golden model of three layers."""
    return load_split(goldens / "tiny-112", monkeypatch, request.param)


def everything(output: Tensor | Output) -> list[Tensor]:
    """All tensors of an output."""
    assert isinstance(output, Output)
    assert output.hidden_states is not None
    assert output.attentions is not None
    return [output.logits, *output.hidden_states, *output.attentions]


def test_the_same_bits(split: Pipeline, tiny_112: Golden) -> None:
    """Padded rows with pictures: logits, hidden states and maps, whole and cached; greedy ids, samples and beams."""
    case = tiny_112.case("left_padded")
    wanted = {"return_hidden": True, "return_attentions": True}
    whole = [everything(model(**case.inputs, **wanted)) for model in (split.model, tiny_112.model)]
    assert all(torch.equal(*pair) for pair in zip(*whole, strict=True))
    caches = [room.allocate(model, 3, 400) for model in (split.model, tiny_112.model)]
    for inputs in (case.inputs, {"input_ids": torch.tensor([[5], [6], [7]])}):
        one, other = (
            model(**inputs, cache=cache) for model, cache in zip((split.model, tiny_112.model), caches, strict=True)
        )
        assert torch.equal(one, other)
    for options in ({}, {"do_sample": True, "seed": 1}, {"beams": 3}):
        asked = {**case.inputs, **options, "max_new_tokens": 8, "stop_ids": ()}
        assert split.generate_ids(**asked) == tiny_112.vl.generate_ids(**asked)


def test_chat_goes_on_from_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds with a kept prefix, a cache that grows, a rewind: the replies of the embedded model, boxes, scores."""
    vl, whole = load_split("tiny", monkeypatch, [1, 3]), qwenvl.load("tiny", "cpu", "float32", quiet=True)
    for one in (vl, whole):
        monkeypatch.setattr("qwenvl.generation.session.CACHE_BLOCK", 8)
        query: Any = [{"image": str(PICTURE)}, {"text": "What can you see?"}]
        reply, history = one.chat(query, do_sample=False)
        again, _ = one.chat("Where is the blue square?", history, do_sample=False)
        other, _ = one.chat("How many are there?", history, do_sample=False)  # back before the last round
        boxes, scores = one.ground(str(PICTURE), "the blue square"), one.score("A blue", [" square", " star"])
        found = [reply, again, other, boxes, scores]
        if one is vl:
            expected = found
    assert found == expected
    assert reply.startswith("<ref>")


def test_many_at_once(split: Pipeline, tiny_112: Golden) -> None:
    """An engine's rows change places, copy beginnings and are erased over several devices as over one."""
    case = tiny_112.case("text")
    (ids,) = case.input_ids.tolist()
    split.start_engine(rows=3, max_length=256, chunk=16)
    assert split.engine is not None
    prompts = [ids[:end] for end in (40, 20, 41, 30, 12)]
    sick = split.engine.submit(ids[:9], should_stop=lambda _: bool(1 // 0))
    requests = [split.engine.submit(prompt, max_new_tokens=6) for prompt in prompts]
    with pytest.raises(ZeroDivisionError):
        sick.result()
    for prompt, request in zip(prompts, requests, strict=True):
        alone = tiny_112.vl.generate_ids(torch.tensor([prompt]), max_new_tokens=6, stop_ids=())
        assert [request.result()] == alone
    assert requests[2].reused


def test_the_cache_does_as_one_tensor_does(split: Pipeline) -> None:
    """Views share memory; rows are reordered, copied and rewound as in a cache of one device."""
    config = split.config
    one = room.allocate(split.model, 4, 6)
    other = KVCache.allocate(config, 4, 6)
    shape = (config.num_hidden_layers, 4, config.num_attention_heads, 6, config.kv_channels)
    assert one.keys.shape == other.keys.shape == shape
    assert (one.batch, one.max_length) == (4, 6)
    for cache in (one, other):
        generator = torch.Generator().manual_seed(0)
        for layer in range(config.num_hidden_layers):
            new = torch.randn(2, 4, *shape[2:], generator=generator)
            cache.append(layer, new[0], new[1], torch.arange(6), 6)
        cache.advance([6, 5, 4, 3])
        cache.reorder([2, 0, 0])
        view = cache.rows(slice(1, 3)).bucket(4)
        view.values[:, 0, :, :2] = view.values[:, 1, :, 2:4]
        cache.keys[:, 3, :, :3] = cache.keys[:, 0, :, :3]
        cache.rewind([2, 2, 2, 2])
    for name in ("keys", "values"):
        assert all(torch.equal(*pair) for pair in zip(getattr(one, name), getattr(other, name), strict=True))
    assert torch.equal(one.lengths, other.lengths)
    stack: Any = one.keys
    for wrong in (slice(0, 2), (0, 1), torch.tensor([0])):
        with pytest.raises(IndexError):
            stack[wrong]
    with pytest.raises(IndexError):
        stack[config.num_hidden_layers]
    with one_line_error(CacheError, "0 x 6"):
        room.allocate(split.model, 0, 6)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "int4"])
def test_adapters_and_packed_weights(packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Int4 layers, and a LoRA adapter that is folded in or stays beside them, give the same bits split as whole."""
    config, folder = small_config(), tmp_path / "model"
    if packed:
        config = dataclasses.replace(config, quantization_config=QuantizationConfig(group_size=32))
    folder.mkdir()
    model = random_model(small_config())
    tensors = packed_tensors(config) if packed else {}
    if not packed:
        for entry in entries(config):
            stored = entry.translate(model.state_dict()[entry.ours], "qwenvl", "reference", config)
            tensors[entry.reference] = stored.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    whole = qwenvl.load(folder, "cpu", "float32", quiet=True)
    add_lora(whole.model, LoraOptions(r=4))
    for layer in lora_layers(whole.model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    save_adapter(whole.model, tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    for adapter in (None, tmp_path / "adapter"):
        whole = qwenvl.load(folder, "cpu", "float32", adapter=adapter, quiet=True)
        vl = load_split(folder, monkeypatch, [1, 1], adapter=adapter)
        assert torch.equal(vl.model(ids), whole.model(ids))
        asked: dict[str, Any] = {"max_new_tokens": 6, "stop_ids": ()}
        assert vl.generate_ids(ids, **asked) == whole.generate_ids(ids, **asked)


# --- devices --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_operation_is_on_one_device(tiny_112: Golden) -> None:
    """Pictures, padded prompts, chunks, steps and beams, given on any device, run on two GPUs, to the same bits.

    What comes back, hidden states and maps too, is on the first.
    """
    split, model = LayerSplit(GPUS, [1, 2]), copy.deepcopy(tiny_112.model)
    split.apply(model)
    put(model, split.device_of)
    case = tiny_112.case("left_padded")
    wanted = {"return_hidden": True, "return_attentions": True}
    expected = everything(tiny_112.model(**case.inputs, **wanted))
    with PretendedDevices():
        assert model.decoder.lm_head.weight.device == model.decoder.blocks[1].ln_1.weight.device == GPUS[1]
        assert model.encode_images(case.inputs["pixels"]).device == GPUS[0]
        outputs = everything(model(**case.inputs, **wanted))
        assert {output.device for output in outputs} == {GPUS[0]}
        cache = room.allocate(model, 3, 400)
        assert [layer.device for layer in cache.keys] == [GPUS[0], GPUS[1], GPUS[1]]
        model(**case.inputs, cache=cache)
        elsewhere = torch.tensor([[5, 6], [7, 8], [9, 3]]).to(GPUS[1])
        assert model(elsewhere, cache=cache).device == GPUS[0]
        assert model.decoder.step(torch.tensor([5, 6, 7], device=GPUS[0]), cache).device == GPUS[0]
        cache.host_lengths += 1
        cache.reorder([2, 0]).rewind([9, 9])
        long = torch.full((1, 600), 5)  # beyond `seq_length`, so that log-n factors move, too
        assert model(long).device == GPUS[0]
        asked: dict[str, Any] = {"max_new_tokens": 6, "stop_ids": ()}
        ids = [Pipeline(model, None).generate_ids(**case.inputs, **asked, beams=beams) for beams in (None, 3)]
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))
    assert ids == [tiny_112.vl.generate_ids(**case.inputs, **asked, beams=beams) for beams in (None, 3)]


def test_a_mix_of_devices_is_noticed(tiny_112: Golden) -> None:
    """Guards the test above: the same model without the moves mixes devices, and that is an error."""
    model = copy.deepcopy(tiny_112.model)
    put(model, LayerSplit(GPUS, [1, 2]).device_of)
    with PretendedDevices(), pytest.raises(MixedDevices, match=r"cuda:0.*cuda:1"):
        model(torch.tensor([[5, 6]]))


def test_moves_last_as_long_as_a_forward(split: Pipeline) -> None:
    """Masks on other devices are kept for the layers of one forward, and not beyond it."""
    ids, mask = padded([torch.tensor([5, 6]), torch.tensor([7, 8, 9])])
    split.model(ids, attention_mask=mask)
    assert len(layers._contexts) == 0


def test_steps_over_several_devices_are_not_captured(split: Pipeline) -> None:
    """A CUDA graph is of one device."""
    assert not Stepper(split.model, room.allocate(split.model, 1, 8)).captures


# --- which device gets what -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "others", "counts"),
    [
        ([100, 100], [0, 0], [5, 5]),
        ([100, 100], [20, 0], [4, 6]),
        ([100, 50], [0, 0], [7, 3]),
        ([100, 100, 100], [30, 0, 10], [2, 5, 3]),
        ([10, 1000], [10, 0], [0, 10]),
        ([0, 1000], [0, 0], [0, 10]),
    ],
)
def test_shares_of_free_memory(free: list[int], others: list[int], counts: list[int]) -> None:
    """The fullest device, by share of its free memory, is as empty as can be; 10 layers of 10 bytes."""
    assert layer_counts(10, 10, others, free) == counts


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """All GPUs, or those that are named, each with its number; of one kind, and there."""
    assert loading.split_devices("cpu, cpu") == [CPU, CPU]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert loading.split_devices("auto") == loading.split_devices("cuda") == GPUS
    assert loading.split_devices("cuda:1,cuda") == GPUS[::-1]
    with one_line_error(ConfigError, "cuda:2"):
        loading.split_devices("cuda:0,cuda:2")
    with one_line_error(ConfigError, "cpu,cuda:0", "one kind"):
        loading.split_devices("cpu,cuda:0")


def test_one_device_is_no_split(capsys: pytest.CaptureFixture[str]) -> None:
    """It works as without, with a remark."""
    vl = qwenvl.load("tiny", "cpu", parallel="layers")
    assert capsys.readouterr().err.count("one device, cpu") == 1
    assert layers.split_of(vl.model) is None


def test_no_room_on_all_devices_together(goldens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPUs cannot hold together is refused before the weights are read, with what would fit."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1_200_000, 10**9))
    with one_line_error(ConfigError, "2.4 MB are free on cuda:0, cuda:1", "dtype bfloat16"):
        qwenvl.load(goldens / "tiny-112", "cuda", "float32", parallel="layers", quiet=True)
