"""Reading a checkpoint: every kind of file, and every way in which one can be broken."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenvl.adapt.int4 import quantize_structure
from qwenvl.config import QuantizationConfig, QwenVLConfig
from qwenvl.errors import CheckpointError, ConfigError
from qwenvl.model.qwenvl import QwenVL
from qwenvl.weights.checkpoint import Checkpoint, load_into
from qwenvl.weights.keymap import entries

Tensors = dict[str, torch.Tensor]
Writer = Callable[..., Path]
KINDS = [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 3), ("old bin", 2)]


def meta_model(config: QwenVLConfig) -> QwenVL:
    with torch.device("meta"):
        return QwenVL(config)


def translated(tensors: Tensors, config: QwenVLConfig) -> Tensors:
    """What loading must yield, by the table's operations alone."""
    return {
        entry.ours: entry.translate(tensors[entry.reference], "reference", "qwenvl", config)
        for entry in entries(config)
    }


@pytest.mark.parametrize(("kind", "shards"), KINDS)
def test_every_kind_of_file_fills_the_model(
    tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer, kind: str, shards: int
) -> None:
    """Safetensors or pickles, one file or several, old or new: the same module, nothing left on the meta device."""
    checkpoint = Checkpoint(write_reference(tiny, tiny_config, kind=kind, shards=shards))
    assert checkpoint.layout == "reference"
    assert checkpoint.bytes == sum(tensor.nbytes for tensor in tiny.values())
    model = meta_model(tiny_config)
    load_into(model, checkpoint, dtype=torch.bfloat16, device="cpu", quiet=True)
    expected = translated(tiny, tiny_config)
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.is_contiguous()


def test_cast_and_trainable_flags(tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer) -> None:
    """Floating tensors take the dtype that was asked for; what was frozen stays frozen, what learns still learns."""
    model = meta_model(tiny_config)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    load_into(
        model,
        Checkpoint(write_reference(tiny, tiny_config)),
        dtype=torch.float32,
        device=torch.device("cpu"),
        quiet=True,
    )
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def test_int4_tensors_keep_what_makes_them_exact(
    int4: Tensors, int4_config: QwenVLConfig, write_reference: Writer
) -> None:
    """In a bfloat16 model the packed words stay int32 and the scales float16; the rest is cast."""
    from qwenvl.adapt.int4 import quantize_structure

    model = meta_model(int4_config)
    quantize_structure(model, int4_config)
    load_into(model, Checkpoint(write_reference(int4, int4_config)), dtype=torch.bfloat16, device="cpu", quiet=True)
    kinds = {"packed": torch.int32, "scale": torch.float16, "float": torch.bfloat16}
    state = model.state_dict()
    assert {e.ours: state[e.ours].dtype for e in entries(int4_config)} == {
        e.ours: kinds[e.kind] for e in entries(int4_config)
    }
    expected = translated(int4, int4_config)
    assert torch.equal(state["decoder.blocks.2.mlp.w1.qweight"], expected["decoder.blocks.2.mlp.w1.qweight"])


def test_training_in_place_leaves_the_files_alone(
    tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer
) -> None:
    """Loaded tensors are private views of the mapped files: writing to them must not write to the checkpoint."""
    folder = write_reference(tiny, tiny_config)
    before = (folder / "model.safetensors").read_bytes()
    model = meta_model(tiny_config)
    load_into(model, Checkpoint(folder), dtype=torch.bfloat16, device="cpu", quiet=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    assert (folder / "model.safetensors").read_bytes() == before


def test_constants_of_older_checkpoints_are_dropped(
    tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer
) -> None:
    """Masks and rotary frequencies that older checkpoints hold are known by name and left out."""
    tiny["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
    tiny["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    tiny["transformer.rotary_emb.inv_freq"] = torch.ones(16)
    tiny["transformer.h.0.attn.rotary_emb.inv_freq"] = torch.ones(16)
    checkpoint = Checkpoint(write_reference(tiny, tiny_config, shards=2))
    assert {entry.ours for entry, _ in checkpoint.stream()} == {entry.ours for entry in entries(tiny_config)}


def test_a_model_of_another_shape(tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer) -> None:
    """A module that is not the checkpoint's is refused before anything is read, with both shapes."""
    checkpoint = Checkpoint(write_reference(tiny, tiny_config))
    other = meta_model(replace(tiny_config, vocab_size=400, num_hidden_layers=4))
    with pytest.raises(CheckpointError, match=r"missing: decoder.blocks.3.*\[320, 128\] where .* \[400, 128\]"):
        load_into(other, checkpoint, dtype=torch.float32, device="cpu")
    assert all(tensor.is_meta for tensor in other.state_dict().values())


# How to break a folder of three safetensors shards, and what the one line must say.
BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {}


def breakage(message: str) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    def register(function: Callable[[Path], object]) -> Callable[[Path], object]:
        BREAKAGES[function.__name__] = (function, message)
        return function

    return register


def shard(folder: Path, number: int = 1) -> Path:
    return folder / f"model-{number:05}-of-00003.safetensors"


def edit(folder: Path, number: int, change: Callable[[Tensors], object], *, listed: bool = True) -> None:
    """Change the tensors of a shard; the index follows if `listed`."""
    tensors = load_file(shard(folder, number))
    before = set(tensors)
    change(tensors)
    save_file(tensors, shard(folder, number), {"format": "pt"})
    if listed:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        for name in before - set(tensors):
            del index["weight_map"][name]
        index["weight_map"] |= dict.fromkeys(tensors, shard(folder, number).name)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@breakage("1 tensor missing: lm_head.weight")
def missing_tensor(folder: Path) -> None:
    edit(folder, 1, lambda tensors: tensors.pop("lm_head.weight"))


@breakage("1 tensor missing: lm_head.weight; 1 tensor unknown: head.weight")
def renamed_tensor(folder: Path) -> None:
    edit(folder, 1, lambda tensors: tensors.update({"head.weight": tensors.pop("lm_head.weight")}))


@breakage("4 tensors unknown: extra.0, extra.1, extra.2 and 1 more")
def extra_tensors(folder: Path) -> None:
    edit(folder, 1, lambda tensors: tensors.update({f"extra.{i}": torch.zeros(1) for i in range(4)}))


@breakage(r"1 tensor wrongly shaped: lm_head.weight is \[320, 127\] where config.json makes it \[320, 128\]")
def misshaped_tensor(folder: Path) -> None:
    edit(folder, 1, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"][:, 1:].contiguous()}))


@breakage("1 tensor of a dtype that it cannot have: lm_head.weight is I32")
def integer_weight(folder: Path) -> None:
    edit(folder, 1, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].int()}))


@breakage("1 tensor of a dtype that it cannot have: lm_head.weight is F8_E4M3")
def unheard_of_dtype(folder: Path) -> None:
    edit(
        folder, 1, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].to(torch.float8_e4m3fn)})
    )


@breakage("tensor lm_head.weight is in both model-00001-of-00003.safetensors and model-00002-of-00003.safetensors")
def tensor_in_two_shards(folder: Path) -> None:
    edit(folder, 2, lambda tensors: tensors.update(only(load_file(shard(folder)), "lm_head.weight")), listed=False)


@breakage("1 tensor in another shard than the index says: lm_head.weight")
def tensor_in_another_shard(folder: Path) -> None:
    moved = only(load_file(shard(folder)), "lm_head.weight")
    edit(folder, 1, lambda tensors: tensors.pop("lm_head.weight"), listed=False)
    edit(folder, 2, lambda tensors: tensors.update(moved), listed=False)


@breakage("1 tensor that the index names and no shard holds: lm_head.weight")
def tensor_lost_from_its_shard(folder: Path) -> None:
    edit(folder, 1, lambda tensors: tensors.pop("lm_head.weight"), listed=False)


@breakage("1 tensor that a shard holds and the index does not name: extra")
def tensor_not_in_the_index(folder: Path) -> None:
    edit(folder, 1, lambda tensors: tensors.update({"extra": torch.zeros(1)}), listed=False)


@breakage("model-00002-of-00003.safetensors is truncated or damaged")
def truncated_data(folder: Path) -> None:
    os.truncate(shard(folder, 2), shard(folder, 2).stat().st_size - 1)


@breakage("model-00002-of-00003.safetensors is truncated or damaged")
def truncated_header(folder: Path) -> None:
    os.truncate(shard(folder, 2), 100)


@breakage("model-00002-of-00003.safetensors is truncated or damaged")
def empty_shard(folder: Path) -> None:
    os.truncate(shard(folder, 2), 0)


@breakage("model-00002-of-00003.safetensors is truncated or damaged")
def corrupt_header(folder: Path) -> None:
    with open(shard(folder, 2), "r+b") as file:
        file.seek(20)
        file.write(b"\xff\xff\xff")


@breakage("lacks 2 of the 3 shards in model.safetensors.index.json: model-00001-of-00003.safetensors, model-00003")
def missing_shards(folder: Path) -> None:
    shard(folder, 1).unlink()
    shard(folder, 3).unlink()


@breakage("model.safetensors.index.json is not valid JSON")
def corrupt_index(folder: Path) -> None:
    os.truncate(folder / "model.safetensors.index.json", 200)


@breakage('has no "weight_map"')
def index_without_a_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


@breakage('has no "weight_map"')
def index_of_numbers(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": 1}}')


@breakage("names shards outside its own folder, which is refused: ../secret.safetensors, /etc/passwd")
def index_that_leaves_the_folder(folder: Path) -> None:
    names = {"a": "../secret.safetensors", "b": "/etc/passwd"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@breakage("holds no weights")
def no_weights(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


@breakage("mixes shards of two layouts")
def two_layouts(folder: Path) -> None:
    save_file(load_file(shard(folder)), shard(folder), {"format": "qwenvl", "version": "1"})


@breakage("format version '2', this version reads '1'; update qwenvl")
def newer_format(folder: Path) -> None:
    save_file(load_file(shard(folder)), shard(folder), {"format": "qwenvl", "version": "2"})


def only(tensors: Tensors, name: str) -> Tensors:
    return {name: tensors[name]}


@pytest.mark.parametrize("name", list(BREAKAGES))
def test_broken_safetensors(tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer, name: str) -> None:
    """Each kind of damage is one clear line that names what is wrong, before any tensor is read."""
    folder = write_reference(tiny, tiny_config, shards=3)
    damage, message = BREAKAGES[name]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as raised:
        Checkpoint(folder)
    assert "\n" not in str(raised.value)
    assert "/" in str(raised.value)  # the place


class Bomb:
    """Unpickling it would run a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("form", ["bin", "old bin", "bare pickle"])
def test_pickles_with_code_are_refused(
    tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer, tmp_path: Path, form: str
) -> None:
    """A `.bin` file whose pickle would run code is refused by name, and the code does not run."""
    folder = write_reference(tiny, tiny_config, kind="bin")
    payload = {"lm_head.weight": Bomb(tmp_path / "ran")}
    if form == "bare pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(payload, protocol=2))
    else:
        torch.save(payload, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model.bin was refused: .*could run code; use .*safetensors"
    ) as e:
        Checkpoint(folder)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["bin", "old bin"])
@pytest.mark.parametrize("kept", [0, 3, 1000, 500_000])
def test_truncated_pickles(
    tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer, kind: str, kept: int
) -> None:
    """A `.bin` file cut anywhere is one clear line, whichever part of the unpickler stumbles."""
    folder = write_reference(tiny, tiny_config, kind=kind)
    os.truncate(folder / "pytorch_model.bin", kept)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin (is truncated or damaged|was refused)") as raised:
        Checkpoint(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"model": {"a": torch.zeros(1)}}, {1: torch.zeros(1)}])
def test_pickles_of_something_else(
    tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer, content: object
) -> None:
    """Lists and nested dictionaries are not weights."""
    folder = write_reference(tiny, tiny_config, kind="bin")
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="does not hold a plain dictionary of named tensors"):
        Checkpoint(folder)


def test_configuration_comes_first(tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer) -> None:
    """Without a usable config.json there is no checkpoint; with the wrong one the tensors do not fit."""
    folder = write_reference(tiny, tiny_config)
    packed = replace(tiny_config, quantization_config=QuantizationConfig())
    (folder / "config.json").write_text(json.dumps(packed.to_dict()))
    with pytest.raises(CheckpointError, match=r"72 tensors missing: .*; 15 tensors unknown"):
        Checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        Checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        Checkpoint(folder)


def test_not_a_folder(tmp_path: Path) -> None:
    """A folder that is not there, or a file in its place, is said to be so."""
    with pytest.raises(CheckpointError, match="there is no folder"):
        Checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint(tmp_path / "file")


def test_safetensors_before_pickles(tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer) -> None:
    """Where a folder has both, the pickles are not even opened."""
    folder = write_reference(tiny, tiny_config)
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert Checkpoint(folder).layout == "reference"


@pytest.mark.parametrize("odd", ["sparse", "meta"])
def test_tensors_without_plain_data(
    tiny: Tensors, tiny_config: QwenVLConfig, write_reference: Writer, odd: str
) -> None:
    """Sparse tensors, and tensors without data, once passed the header and failed in the middle of a conversion."""
    name = "lm_head.weight"
    strange = tiny[name].float().to_sparse() if odd == "sparse" else tiny[name].to("meta")
    with pytest.raises(CheckpointError, match="all of them dense"):
        Checkpoint(write_reference({**tiny, name: strange}, tiny_config, kind="bin"))


def test_groups_without_a_scale(int4: Tensors, int4_config: QwenVLConfig, write_reference: Writer) -> None:
    """A group number beyond the scales stops the load; it once loaded and failed in the first forward."""
    name = "transformer.h.0.attn.c_attn.g_idx"
    checkpoint = Checkpoint(write_reference({**int4, name: int4[name] + 7}, int4_config))
    model = meta_model(int4_config)
    quantize_structure(model, int4_config)
    with pytest.raises(CheckpointError, match="names groups outside 0 to"):
        load_into(model, checkpoint, dtype=torch.float32, device="cpu", quiet=True)
