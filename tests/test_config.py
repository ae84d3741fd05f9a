"""Configurations are valid once they exist; whatever else a file says is one line that names file and key."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from support import one_line_error

from qwenvl.config import GenerationConfig, QuantizationConfig, QwenVLConfig, read_json
from qwenvl.errors import ConfigError

NOT_POSITIVE_WHOLE = [0, -1, 1.5, 4.0, True, "4", [4], float("nan")]
NOT_ABOVE_ZERO = [0, -1e-6, float("nan"), float("inf"), True, "1", [1], 10**400]


@pytest.fixture
def tiny(goldens: Path) -> dict[str, Any]:
    """A valid config.json."""
    data: dict[str, Any] = json.loads((goldens / "tiny-112" / "config.json").read_text())
    return data


def test_the_published_configuration(reference_dir: Path) -> None:
    """The Int4 checkpoint's own files, number by number."""
    config = QwenVLConfig.load(reference_dir / "hf")
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (4096, 32, 32)
    assert (config.vocab_size, config.seq_length, config.max_position_embeddings) == (151936, 2048, 8192)
    assert (config.mlp_width, config.kv_channels) == (11008, 128)
    vision = config.visual
    assert (vision.grid, vision.mlp_width, vision.resampler_heads) == (32, 8192, 32)
    assert (vision.image_start_id, vision.image_end_id, vision.image_pad_id) == (151857, 151858, 151859)
    assert config.quantization_config == QuantizationConfig()
    generation = GenerationConfig.load(reference_dir / "hf")
    assert (generation.do_sample, generation.top_p, generation.chat_format) == (True, 0.5, "chatml")


def test_defaults_are_the_papers(tiny: dict[str, Any]) -> None:
    """Left out, the vision part is Qwen-VL's; unknown keys, as transformers writes many, are no matter."""
    config = QwenVLConfig.from_dict(
        {**tiny, "architectures": ["X"], "auto_map": {}, "visual": {**tiny["visual"], "x": 1}}
    )
    assert config == QwenVLConfig.from_dict(tiny)
    assert config.visual.n_queries == 256


def test_there_and_back(tiny: dict[str, Any]) -> None:
    """`to_dict` is JSON that `from_dict` reads as the same."""
    for quantization in ({}, {"quantization_config": {"bits": 4, "group_size": 64, "sym": False, "desc_act": True}}):
        config = QwenVLConfig.from_dict({**tiny, **quantization})
        assert QwenVLConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize("value", NOT_POSITIVE_WHOLE, ids=repr)
@pytest.mark.parametrize(
    "name",
    [
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        *("kv_channels", "max_position_embeddings", "seq_length"),
    ],
)
def test_whole_numbers(tiny: dict[str, Any], name: str, value: object) -> None:
    """Zero, negative, broken, boolean or text: refused with key and value."""
    with one_line_error(ConfigError, "config.json", name, repr(value)):
        QwenVLConfig.from_dict({**tiny, name: value})


@pytest.mark.parametrize("value", NOT_POSITIVE_WHOLE, ids=repr)
@pytest.mark.parametrize(
    "name", ["image_size", "patch_size", "width", "layers", "heads", "output_dim", "image_start_id", "n_queries"]
)
def test_whole_numbers_of_vision(tiny: dict[str, Any], name: str, value: object) -> None:
    """The same in the part for the tower."""
    with one_line_error(ConfigError, "config.json: visual", name, repr(value)):
        QwenVLConfig.from_dict({**tiny, "visual": {**tiny["visual"], name: value}})


@pytest.mark.parametrize("value", NOT_ABOVE_ZERO, ids=lambda value: repr(value)[:8])
@pytest.mark.parametrize("name", ["layer_norm_epsilon", "rotary_emb_base", "initializer_range", "mlp_ratio"])
def test_numbers(tiny: dict[str, Any], name: str, value: object) -> None:
    """Not above zero, NaN, infinite, or an integer that no float holds: refused, not an OverflowError."""
    data = {**tiny, "visual": {**tiny["visual"], "mlp_ratio": value}} if name == "mlp_ratio" else {**tiny, name: value}
    with one_line_error(ConfigError, "config.json", name):
        QwenVLConfig.from_dict(data)


@pytest.mark.parametrize("value", [0, 1, "true"], ids=repr)
@pytest.mark.parametrize("name", ["use_dynamic_ntk", "use_logn_attn"])
def test_switches(tiny: dict[str, Any], name: str, value: object) -> None:
    """Booleans are not numbers, and a text that says "false" is not false."""
    with one_line_error(ConfigError, name, repr(value)):
        QwenVLConfig.from_dict({**tiny, name: value})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_attention_heads": 3}, ["num_attention_heads x kv_channels", "3 x 32", 128]),
        ({"kv_channels": 64}, ["4 x 64", 128]),
        ({"kv_channels": 1, "num_attention_heads": 128}, ["kv_channels 1"]),
        ({"kv_channels": 2, "num_attention_heads": 64}, ["kv_channels 2"]),
        ({"intermediate_size": 351}, ["intermediate_size 351", "even"]),
        ({"vocab_size": 302}, ["image_start_id 300", "vocab_size 302"]),
        ({"seq_length": 1}, ["seq_length", 1]),
        ({"rotary_pct": 0.25}, ["rotary_pct 0.25"]),
        ({"no_bias": False}, ["no_bias False"]),
        ({"scale_attn_weights": False}, ["scale_attn_weights False"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings True"]),
        ({"emb_dropout_prob": 0.1}, ["emb_dropout_prob 0.1"]),
        ({"attn_dropout_prob": float("nan")}, ["attn_dropout_prob nan"]),
        ({"visual": {"image_size": 113}}, ["image_size 113", "patch_size 14"]),
        ({"visual": {"heads": 3}}, ["width 64", "heads 3"]),
        ({"visual": {"output_dim": 256}}, ["visual.output_dim 256", "hidden_size 128"]),
        ({"visual": {"output_dim": 100}}, ["output_dim 100"]),
        ({"visual": {"output_dim": 642}}, ["output_dim 642"]),
        ({"visual": {"n_queries": 15}}, ["n_queries", "square", 15]),
        ({"visual": {"mlp_ratio": 0.001}}, ["mlp_ratio 0.001", "width 64"]),
        ({"visual": {"mlp_ratio": 1e30}}, ["mlp_ratio 1e+30", "width 64"]),
        ({"quantization_config": {"bits": 3}}, ["quantization_config", "bits", 3]),
        ({"quantization_config": {"bits": "4"}}, ["bits", "'4'"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quant_method 'awq'"]),
        ({"quantization_config": {"quant_method": ["gptq"]}}, ["quant_method ['gptq']"]),
        ({"quantization_config": {"group_size": 0}}, ["group_size", "or -1", "not 0"]),
        ({"quantization_config": {"group_size": -2}}, ["group_size", -2]),
        ({"quantization_config": {"lm_head": "yes"}}, ["lm_head", "'yes'"]),
        ({"quantization_config": {"sym": 1}}, ["sym", 1]),
        ({"quantization_config": []}, ["quantization_config", "JSON object", "list"]),
        ({"visual": []}, ["visual", "JSON object", "list"]),
        ({"visual": None}, ["visual", "JSON object"]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_values_that_do_not_fit(tiny: dict[str, Any], changes: dict[str, Any], says: list[Any]) -> None:
    """What does not divide, does not agree or is not supported is refused with the numbers of both sides."""
    if isinstance(changes.get("visual"), dict):
        changes = {"visual": {**tiny["visual"], **changes["visual"]}}
    with one_line_error(ConfigError, "config.json", *says):
        QwenVLConfig.from_dict({**tiny, **changes})


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "visual"])
def test_missing_keys(tiny: dict[str, Any], name: str) -> None:
    """What has no default must be there."""
    del tiny[name]
    with one_line_error(ConfigError, "config.json", "lacks", name):
        QwenVLConfig.from_dict(tiny)


def test_null_means_not_set(tiny: dict[str, Any]) -> None:
    """A null is as if the key were not there: a default, or what is missing."""
    nulls = {"kv_channels": None, "seq_length": None, "use_logn_attn": None, "quantization_config": None}
    without = {name: value for name, value in tiny.items() if name not in nulls}
    same = {"num_attention_heads": 1}  # of the default 128
    assert QwenVLConfig.from_dict({**tiny, **nulls, **same}) == QwenVLConfig.from_dict({**without, **same})
    with one_line_error(ConfigError, "lacks", "vocab_size"):
        QwenVLConfig.from_dict({**tiny, "vocab_size": None})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"vocab_size": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda content: repr(content)[:20],
)
def test_files_that_hold_no_configuration(tmp_path: Path, content: bytes) -> None:
    """Empty, cut off, not an object, not UTF-8, nested or with digits without end: one line that names the file."""
    (tmp_path / "config.json").write_bytes(content)
    with one_line_error(ConfigError, "config.json"):
        QwenVLConfig.load(tmp_path)
    (tmp_path / "generation_config.json").write_bytes(content)
    with one_line_error(ConfigError, "generation_config.json"):
        GenerationConfig.load(tmp_path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """No file, or a folder in its place."""
    with one_line_error(ConfigError, "config.json", "No such file"):
        QwenVLConfig.load(tmp_path)
    (tmp_path / "config.json").mkdir()
    with one_line_error(ConfigError, "config.json"):
        QwenVLConfig.load(tmp_path)
    with one_line_error(ConfigError, "nowhere.json"):
        read_json(tmp_path / "nowhere.json")


# --- generation_config.json -----------------------------------------------------------------------------------------


def test_no_file_means_the_defaults(tmp_path: Path) -> None:
    """Greedy and ChatML."""
    config = GenerationConfig.load(tmp_path)
    assert config == GenerationConfig()
    assert (config.do_sample, config.chat_format, config.eos_token_ids) == (False, "chatml", ())


@pytest.mark.parametrize(
    ("eos", "ids"), [(None, ()), (5, (5,)), (0, (0,)), ([5, 6], (5, 6)), ([], ()), ([7], (7,))], ids=repr
)
def test_one_or_several_end_ids(eos: object, ids: tuple[int, ...]) -> None:
    """null, an id, or a list of them; the result can be hashed."""
    config = GenerationConfig.from_dict({"eos_token_id": eos})
    assert config.eos_token_ids == ids
    hash(config)


def test_nulls_mean_not_set() -> None:
    """As transformers writes them; so do its own keys, which we do not know."""
    nulls = {field.name: None for field in dataclasses.fields(GenerationConfig)}
    assert GenerationConfig.from_dict({**nulls, "transformers_version": "4.31.0"}) == GenerationConfig()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eos_token_id", "151643"),
        ("eos_token_id", [1, "2"]),
        ("eos_token_id", True),
        ("eos_token_id", [True]),
        ("eos_token_id", -1),
        ("eos_token_id", 1.0),
        ("eos_token_id", [[1]]),
        ("eos_token_id", {"a": 1}),
        ("chat_format", "llama"),
        ("chat_format", ["raw"]),
        ("do_sample", 1),
        ("do_sample", "false"),
        ("temperature", 0),
        ("temperature", float("nan")),
        ("temperature", True),
        ("temperature", 10**400),
        ("top_p", -0.1),
        ("top_p", "0.3"),
        ("top_p", 1.5),
        ("repetition_penalty", 0),
        ("frequency_penalty", 2.5),
        ("presence_penalty", "1"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("no_repeat_ngram_size", False),
        ("min_new_tokens", "1"),
        ("max_new_tokens", 0),
        ("max_new_tokens", 1e9),
        ("max_window_size", -5),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_wrong_generation_values(name: str, value: object) -> None:
    """Each is refused with key and value, where it is read and not where it is used."""
    with one_line_error(ConfigError, "generation_config.json", name):
        GenerationConfig.from_dict({name: value})


@pytest.mark.parametrize("where", ["decoder", "vision"])
def test_layers_without_end(tiny: dict[str, Any], where: str) -> None:
    """A corrupt number of layers once filled the memory with empty modules instead of giving one line."""
    changed = {"num_hidden_layers": 10**9} if where == "decoder" else {"visual": {**tiny["visual"], "layers": 10**9}}
    with one_line_error(ConfigError, "layers", 10**9):
        QwenVLConfig.from_dict({**tiny, **changed})
