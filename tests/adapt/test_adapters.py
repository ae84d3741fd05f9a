"""Adapters on disk: PEFT's folder in both directions, what is refused, and that nothing is half-written."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import one_line_error, random_model, small_config
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard

import qwenvl
from qwenvl.adapt import adapters
from qwenvl.adapt.adapters import load_adapter, save_adapter
from qwenvl.adapt.int4 import quantize_structure
from qwenvl.adapt.lora import LoraOptions, add_lora, lora_layers
from qwenvl.adapt.packed import PackedLinear
from qwenvl.config import QwenVLConfig
from qwenvl.errors import CheckpointError, ConfigError, QwenVLError
from qwenvl.model.qwenvl import QwenVL

CONFIG_FILE, FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# What PEFT 0.21.2 wrote for a tree of modules with the reference's names, but for rank, dropout and targets.
PEFTS_OWN = {
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "exclude_modules")),
    **dict.fromkeys(("kasa_config", "layer_replication", "layers_pattern", "layers_to_transform", "lora_ga_config")),
    **dict.fromkeys(("megatron_config", "modules_to_save", "monteclora_config", "revision", "target_parameters")),
    **dict.fromkeys(("task_type", "trainable_token_indices", "use_bdlora", "velora_config", "base_model_name_or_path")),
    **dict.fromkeys(("ensure_weight_tying", "fan_in_fan_out", "lora_bias", "use_dora", "use_qalora"), False),
    "use_rslora": False,
    "auto_mapping": {"base_model_class": "QWenLMHeadModel", "parent_library": "transformers_modules.modeling_qwen"},
    "alpha_pattern": {},
    "rank_pattern": {},
    "loftq_config": {},
    "bias": "none",
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "megatron_core": "megatron.core",
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 4,
    "target_modules": ["w2", "attn.c_proj", "c_attn", "w1"],
}


def ids() -> Tensor:
    """Ordinary ids [B,T], always the same."""
    return torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(5))


def base(seed: int = 0, **changes: Any) -> QwenVL:
    """The base model under every adapter here."""
    return random_model(small_config(**changes), seed)


def tuned(options: LoraOptions, **changes: Any) -> QwenVL:
    """The base with adapters that say something."""
    model = base(**changes)
    add_lora(model, options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.endswith("lora_A"):
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of rank 4 over the small base."""
    save_adapter(tuned(LoraOptions(r=4)), tmp_path / "adapter", "Qwen/Some-Base")
    return tmp_path / "adapter"


def rewrite(folder: Path, **changes: Any) -> None:
    """Change keys of an adapter's configuration."""
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same_adapters(one: Path, other: Path) -> bool:
    """Whether two folders hold the same configuration, tensors and record of the base."""
    files = [safe_open(folder / FILE, "pt") for folder in (one, other)]
    tensors, again = load_file(one / FILE), load_file(other / FILE)
    return (
        (one / CONFIG_FILE).read_bytes() == (other / CONFIG_FILE).read_bytes()
        and files[0].metadata() == files[1].metadata()
        and tensors.keys() == again.keys()
        and all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
    )


def refused(kind: type[QwenVLError], model: QwenVL, folder: Path, *says: str | int, **options: Any) -> None:
    """Loading fails with this error, and leaves the model as it was."""
    before = {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}
    with one_line_error(kind, *says):
        load_adapter(model, folder, **options)
    assert before == {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}


# --- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("embeddings", [False, True], ids=["plain", "with embeddings"])
@pytest.mark.parametrize("targets", [("c_attn", "attn.c_proj", "w1", "w2"), ("mlp.c_proj", "h.1.attn.c_attn")], ids=str)
def test_saved_and_loaded(tmp_path: Path, targets: tuple[str, ...], embeddings: bool) -> None:
    """The loaded adapter computes what the saved one did, to the bit; folded in, to 1e-5; saved again, the same."""
    model = tuned(LoraOptions(r=4, alpha=2, dropout=0.1, targets=targets, train_embeddings=embeddings))
    expected = model(ids())
    assert not torch.allclose(expected, base()(ids()), atol=1e-2)
    save_adapter(model, tmp_path / "one", "some/base")
    beside, folded = base(), base()
    load_adapter(beside, tmp_path / "one")
    load_adapter(folded, tmp_path / "one", merge=True)
    assert torch.equal(beside(ids()), expected)
    torch.testing.assert_close(folded(ids()), expected, atol=1e-5, rtol=0)
    assert list(folded.state_dict()) == list(base().state_dict())
    save_adapter(beside, tmp_path / "two", "some/base")
    assert same_adapters(tmp_path / "one", tmp_path / "two")
    (options,) = {layer.options for layer in lora_layers(beside).values()}
    assert (options.r, options.alpha, options.dropout, options.train_embeddings) == (4, 2, 0.1, embeddings)


def test_names_and_configuration_are_pefts(tmp_path: Path) -> None:
    """Written out by hand, as PEFT has them for the reference's model, so that others' tools can read them."""
    save_adapter(tuned(LoraOptions(r=4, train_embeddings=True)), tmp_path / "adapter", "Qwen/Qwen-VL")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {CONFIG_FILE, FILE}
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "adapter" / FILE).items()}
    sizes = {"attn.c_attn": (128, 384), "attn.c_proj": (128, 128), "mlp.w1": (128, 128), "mlp.w2": (128, 128)}
    expected = {f"{PREFIX}transformer.wte.weight": (64, 128), f"{PREFIX}lm_head.weight": (64, 128)}
    for i in range(2):
        for name, (inputs, outputs) in sizes.items():
            expected[f"{PREFIX}transformer.h.{i}.{name}.lora_A.weight"] = (4, inputs)
            expected[f"{PREFIX}transformer.h.{i}.{name}.lora_B.weight"] = (outputs, 4)
    assert shapes == expected
    assert json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "Qwen/Qwen-VL",
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": ["c_attn", "attn.c_proj", "w1", "w2"],
        "modules_to_save": ["wte", "lm_head"],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    with safe_open(tmp_path / "adapter" / FILE, "pt") as opened:
        assert opened.metadata()["format"] == "pt"


def test_target_that_the_vision_tower_has_too_is_spelled_out(tmp_path: Path) -> None:
    """By "mlp.c_proj" PEFT would also adapt the reference's vision tower, which this adapter does not."""
    save_adapter(tuned(LoraOptions(r=4, targets=("mlp.c_proj", "w1"))), tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())["target_modules"]
    assert written == ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj", "w1"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_modules": r"transformer\.h\.\d+\.(attn\.c_(attn|proj)|mlp\.w[12])"},
        {"target_modules": r".*\.h\..*\.(attn\.c_attn|attn\.c_proj|w1|w2)", "lora_dropout": 0},
        {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva", "revision": "main", "lora_alpha": 16.0},
    ],
    ids=["list", "regular expression", "another", "other settings that change nothing"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pefts_own_adapter(folder: Path, changes: dict[str, Any], dtype: torch.dtype) -> None:
    """Every key of PEFT's own configuration, its own header, and 16-bit tensors, as it writes them if told to."""
    (folder / CONFIG_FILE).write_text(json.dumps(PEFTS_OWN | changes))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / FILE).items()}
    save_file(tensors, folder / FILE, {"format": "pt"})
    model = base()
    load_adapter(model, folder)
    expected = tuned(LoraOptions(r=4))
    with torch.no_grad():
        for layer in lora_layers(expected).values():
            layer.lora_A.copy_(layer.lora_A.to(dtype))
            layer.lora_B.copy_(layer.lora_B.to(dtype))
    assert torch.equal(model(ids()), expected(ids()))
    assert {layer.lora_A.dtype for layer in lora_layers(model).values()} == {torch.float32}
    assert len(lora_layers(model)) == 8


def test_for_inference_or_to_go_on(tmp_path: Path) -> None:
    """Loaded for use, nothing of the adapter asks for a gradient and the dtype is the model's; else as `add_lora`."""
    save_adapter(tuned(LoraOptions(r=4, train_embeddings=True)), tmp_path / "adapter")
    used, trained = base().bfloat16(), base().bfloat16()
    load_adapter(used, tmp_path / "adapter")
    assert used(ids()).dtype == torch.bfloat16, "without autocast"
    assert not any(p.requires_grad for layer in lora_layers(used).values() for p in (layer.lora_A, layer.lora_B))
    assert not any(layer.training for layer in lora_layers(used).values()), "no dropout: the model was in eval mode"
    load_adapter(trained, tmp_path / "adapter", trainable=True)
    asking = {name: parameter for name, parameter in trained.named_parameters() if parameter.requires_grad}
    assert len(asking) == 2 + 2 * 8
    assert {parameter.dtype for parameter in asking.values()} == {torch.float32}
    saved = load_file(tmp_path / "adapter" / FILE)
    assert torch.equal(asking["decoder.lm_head.weight"], saved[f"{PREFIX}lm_head.weight"])
    with one_line_error(ConfigError, "merge or trainable"):
        load_adapter(base(), tmp_path / "adapter", merge=True, trainable=True)


def test_a_chat_goes_on_with_the_new_weights(tmp_path: Path, chat_folder: Path) -> None:
    """A session's cached prefix is of the old weights: after an adapter is folded in, it is computed anew."""
    one, other = (qwenvl.load(chat_folder, device="cpu", dtype="float32", quiet=True) for _ in range(2))
    model = qwenvl.load(chat_folder, device="cpu", dtype="float32", quiet=True).model
    add_lora(model, LoraOptions(r=4))
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(std=0.05)
    save_adapter(model, tmp_path / "adapter")
    _, history = one.chat("what is this", max_new_tokens=4)
    load_adapter(one.model, tmp_path / "adapter", merge=True)
    load_adapter(other.model, tmp_path / "adapter", merge=True)
    assert one.chat("where", history, max_new_tokens=8)[0] == other.chat("where", history, max_new_tokens=8)[0]


# --- over packed and other bases ------------------------------------------------------------------------------------


def packed_like(model: QwenVL, bits: int = 4) -> QwenVL:
    """A packed model with the norms, biases and vision of another: what quantisation leaves as it is."""
    config = QwenVLConfig.from_dict({**model.config.to_dict(), "quantization_config": {"bits": bits, "group_size": 32}})
    packed = QwenVL(config).eval()
    quantize_structure(packed, config)
    packed.load_state_dict(model.state_dict(), strict=False)
    return packed


@pytest.mark.parametrize("bits", [4, 8])
def test_from_a_packed_base_to_the_plain_one(tmp_path: Path, bits: int) -> None:
    """What QLoRA trains is loaded over packed weights, and merged into the weights that they were packed from."""
    packed = packed_like(base(), bits)
    add_lora(packed, LoraOptions(r=4))
    save_adapter(packed, tmp_path / "adapter")
    load_adapter(packed_like(base(), bits), tmp_path / "adapter")
    load_adapter(base(), tmp_path / "adapter", merge=True)
    fresh = packed_like(base(), bits)
    with one_line_error(ConfigError, "packed to a few bits", "16-bit checkpoint"):
        load_adapter(fresh, tmp_path / "adapter", merge=True)
    assert not lora_layers(fresh)
    assert isinstance(fresh.decoder.blocks[0].attn.c_attn, PackedLinear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_another_base_is_refused(folder: Path, dtype: torch.dtype) -> None:
    """Same shapes, other weights: told by the weights that adapters leave alone. The same base in any dtype is it."""
    load_adapter(base().to(dtype), folder)
    refused(CheckpointError, base(seed=1).to(dtype), folder, "another base model", "Qwen/Some-Base")
    finetuned = base().to(dtype)
    with torch.no_grad():
        finetuned.decoder.blocks[1].attn.c_attn.bias[3] += 0.01
    refused(CheckpointError, finetuned, folder, "another base model")


def test_a_base_that_took_an_adapter_in_is_another(folder: Path) -> None:
    """Folding in changes the linears alone. It was trained over those without: it would be taken in twice."""
    merged = base()
    load_adapter(merged, folder, merge=True)
    refused(CheckpointError, merged, folder, "another base model")
    refused(CheckpointError, merged.bfloat16(), folder, "another base model")


def test_damaged_record_of_the_base(folder: Path) -> None:
    """A header that was edited by hand is a damaged file, not a bug."""
    for record in ("[1, 2", '{"a": 1}', '["x"]', "[[1], [1, 2]]", f"[{10**400}]", "[" * 10_000):
        for key in ("qwenvl_base", "qwenvl_base_linears"):
            save_file(load_file(folder / FILE), folder / FILE, {"format": "pt", key: record})
            refused(CheckpointError, base(), folder, "damaged", key)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 3}, ["8 tensors missing", "transformer.h.2.attn.c_attn.lora_A.weight"]),
        ({"num_hidden_layers": 1}, ["8 tensors unknown", "transformer.h.1"]),
        ({"intermediate_size": 512}, ["wrongly shaped", "mlp.w1.lora_B.weight is [128, 4] and should be [256, 4]"]),
    ],
    ids=["more layers", "fewer layers", "wider"],
)
def test_a_base_of_other_sizes_is_refused(folder: Path, changes: dict[str, int], says: list[str]) -> None:
    """With the names and the shapes."""
    refused(CheckpointError, base(**changes), folder, "not an adapter for this model", *says)


# --- configurations that are refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, ["peft_type", "'IA3'", "LORA"]),
        ({"peft_type": None}, ["peft_type", "None"]),
        *[({name: True}, [name, "plain LoRA"]) for name in ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias")],
        ({"rank_pattern": {"w1": 8}}, ["rank_pattern"]),
        ({"alpha_pattern": {"w1": 8}}, ["alpha_pattern"]),
        ({"layers_to_transform": [0]}, ["layers_to_transform"]),
        ({"exclude_modules": ["h.0"]}, ["exclude_modules"]),
        ({"of_next_year": {"twist": 1}}, ["of_next_year"]),
        ({"bias": "lora_only"}, ["bias"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save", "both or neither"]),
        ({"modules_to_save": 5}, ["modules_to_save"]),
        ({"target_modules": ["q_proj", "v_proj"]}, ["q_proj, v_proj", "attn.c_attn", "does not fit this model"]),
        ({"target_modules": r"model\.layers\..*"}, [r"model\.layers\..*", "names no linear"]),
        ({"target_modules": r"transformer\.h\.\d+\.attn\.c_"}, ["names no linear"]),  # the beginning of a path
        ({"target_modules": "(("}, ["not a regular expression"]),
        ({"target_modules": None}, ["targets", "None"]),
        ({"target_modules": [1]}, ["targets"]),
        ({"r": None}, ["r must be", "None"]),
        ({"r": 0}, ["r must be"]),
        ({"lora_alpha": "16"}, ["alpha"]),
        ({"lora_dropout": 2}, ["dropout"]),
    ],
    ids=str,
)
def test_configurations_that_are_refused(folder: Path, changes: dict[str, Any], says: list[str]) -> None:
    """Other methods, whatever would change what an adapter computes, other architectures, and nonsense: one line."""
    rewrite(folder, **changes)
    refused(ConfigError, base(), folder, str(folder / CONFIG_FILE), *says)


def test_folders_that_are_no_adapters(tmp_path: Path, folder: Path) -> None:
    """No such folder, no configuration, one that is not JSON, no weights, an adapter over an adapter."""
    refused(ConfigError, base(), tmp_path / "nowhere", "adapter_config.json", "PEFT")
    for content in ("{", "[]", '"LORA"'):
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        (other / CONFIG_FILE).write_text(content)
        refused(ConfigError, base(), other, str(other / CONFIG_FILE))
    model = base()
    load_adapter(model, folder)
    refused(ConfigError, model, folder, "adapters already")
    (folder / FILE).unlink()
    refused(CheckpointError, base(), folder, "has no adapter_model.safetensors")


# --- tensors that are refused ---------------------------------------------------------------------------------------


def test_pickles_are_refused(folder: Path) -> None:
    """Older PEFT wrote `adapter_model.bin`: never opened, and the line says how to rewrite it."""
    (folder / FILE).rename(folder / "adapter_model.bin")
    refused(CheckpointError, base(), folder, "adapter_model.bin is a pickle", "save_file", "weights_only=True")


def test_tensors_that_are_refused(folder: Path) -> None:
    """Missing, unknown, wrongly shaped and typed ones, all in one line."""
    tensors = load_file(folder / FILE)
    a, b, *others = tensors
    tensors[b] = tensors[b][:, :2].contiguous()
    tensors[others[0]] = tensors[others[0]].int()
    tensors[f"{PREFIX}transformer.visual.transformer.resblocks.0.mlp.c_proj.lora_A.weight"] = tensors.pop(a)
    save_file(tensors, folder / FILE, {"format": "pt"})
    said = [
        f"1 tensor missing: {a}",
        "1 tensor unknown: ",
        "visual.transformer",
        f"wrongly shaped: {b}",
        "of a dtype",
    ]
    refused(CheckpointError, base(), folder, *said, others[0])


@pytest.mark.parametrize("keep", [0, 5, 100, -1], ids=str)
def test_truncated_file(folder: Path, keep: int) -> None:
    """Cut off anywhere: refused, in one line."""
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[:keep])
    refused(CheckpointError, base(), folder, FILE, "truncated or damaged")


# --- writing --------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(folder: Path) -> None:
    """A folder in use is refused and stays as it is; an empty one is taken."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with one_line_error(CheckpointError, "exists and holds something else"):
        save_adapter(tuned(LoraOptions(r=2)), folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    empty = folder.parent / "empty"
    empty.mkdir()
    save_adapter(tuned(LoraOptions(r=2)), empty)
    load_adapter(base(), empty)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["adapter", "empty"]
    with one_line_error(ConfigError, "no LoRA adapters to save"):
        save_adapter(base(), folder.parent / "none")


@pytest.mark.parametrize("at", ["save_file", "whole_file", "flush_folder"])
def test_a_write_that_fails_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """A full disk at any point but the last is one line and no adapter; the next run cleans up and succeeds."""
    model = tuned(LoraOptions(r=4))
    with monkeypatch.context() as broken:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        broken.setattr(adapters, at, full)
        with one_line_error(CheckpointError, "cannot write", "No space left on device"):
            save_adapter(model, tmp_path / "adapter")
    if at == "flush_folder":  # it has its name, and all that it holds
        load_adapter(base(), tmp_path / "adapter")
        return
    assert not (tmp_path / "adapter").exists()
    (tmp_path / "adapter.partial" / f"{FILE}.tmp").write_text("half")
    save_adapter(model, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {CONFIG_FILE, FILE}
    load_adapter(base(), tmp_path / "adapter")


def test_what_is_not_ours_is_not_removed(tmp_path: Path) -> None:
    """A folder that happens to have the temporary name keeps its files."""
    (tmp_path / "adapter.partial").mkdir()
    (tmp_path / "adapter.partial" / "thesis.tex").write_text("years")
    with one_line_error(CheckpointError, "thesis.tex", "move them away"):
        save_adapter(tuned(LoraOptions(r=4)), tmp_path / "adapter")
    assert (tmp_path / "adapter.partial" / "thesis.tex").read_text() == "years"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    """A folder without permission: one line."""
    tmp_path.chmod(0o500)
    with one_line_error(CheckpointError, "cannot write", "Permission denied"):
        save_adapter(tuned(LoraOptions(r=4)), tmp_path / "adapter")


# --- sharded --------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of one, in this process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("embeddings", [False, True], ids=["plain", "with embeddings"])
def test_sharded_model(tmp_path: Path, embeddings: bool) -> None:
    """Under FSDP2 the loss and the adapters' gradients are the same, and the adapter is saved whole."""
    options = LoraOptions(r=4, train_embeddings=embeddings)
    whole, sharded = tuned(options), tuned(options)
    for module in (*sharded.decoder.blocks, sharded):
        fully_shard(module)
    losses = [model(ids()).float().logsumexp(-1).mean() for model in (whole, sharded)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    expected = {name: p.grad for name, p in whole.named_parameters() if p.requires_grad}
    gradients = {name: p.grad.full_tensor() for name, p in sharded.named_parameters() if p.requires_grad}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name])
    save_adapter(sharded, tmp_path / "sharded")
    save_adapter(whole, tmp_path / "whole")
    assert same_adapters(tmp_path / "sharded", tmp_path / "whole")
