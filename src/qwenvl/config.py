"""What a checkpoint's JSON files say, as frozen dataclasses that are valid once they exist.

    VisionConfig         the `visual` part of config.json
    QuantizationConfig   the `quantization_config` part of config.json
    QwenVLConfig         config.json
    SamplingOptions      how ids are chosen, for one call
    GenerationConfig     generation_config.json: the checkpoint's own options, and more

Nothing is inferred from a path or a repository's name. Keys that we do not know are ignored, as `transformers` writes
many of its own; a key that we know and whose value we could not honour is refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .checks import booleans, is_number, is_whole, positive_numbers, positive_whole_numbers, require
from .errors import ConfigError

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
REFERENCE_GRID = 16  # `visual.positional_embedding` always has 16 x 16 rows, whatever the image size
MAX_LAYERS = 1000  # far above any model; a corrupt number should not fill the memory with empty modules
RESAMPLER_HEAD_SIZE = 128  # the reference derives the resampler's head count as output_dim // 128

Config = TypeVar("Config", "VisionConfig", "QuantizationConfig", "QwenVLConfig", "GenerationConfig")


def _from_json_object(kind: type[Config], data: Any, where: str) -> Config:  # noqa: ANN401 - parsed JSON
    """Build `kind` from the keys of `data` that it has as fields; a field without a default must be there.

    `transformers` writes null for "not set".
    """
    require(isinstance(data, dict), f"{where} must be a JSON object, not {type(data).__name__}")
    fields = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(kind)}
    given = {name: value for name, value in data.items() if name in fields and value is not None}
    missing = [name for name, required in fields.items() if required and name not in given]
    require(not missing, f"{where} lacks {', '.join(missing)}")
    try:
        return kind(**given)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def read_json(path: Path) -> Any:  # noqa: ANN401 - parsed JSON
    """The JSON in a file. Raises ConfigError, with the place, if it cannot be read or parsed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, thousands of digits, or nested without end
        raise ConfigError(f"{path} is not valid JSON: {error}") from None


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower and the resampler (paper section 2.1; defaults are Qwen-VL's).

    `image_size` and `patch_size` are pixels; `n_queries` is the number of visual tokens that one image becomes.
    """

    image_size: int = 448
    patch_size: int = 14
    width: int = 1664
    layers: int = 48
    heads: int = 16
    mlp_ratio: float = 4.9231
    output_dim: int = 4096
    image_start_id: int = 151857
    n_queries: int = 256

    def __post_init__(self) -> None:
        positive_whole_numbers(
            self, "image_size", "patch_size", "width", "layers", "heads", "output_dim", "image_start_id", "n_queries"
        )
        positive_numbers(self, "mlp_ratio")
        require(
            self.image_size % self.patch_size == 0,
            f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}",
        )
        require(self.layers <= MAX_LAYERS, f"layers must be at most {MAX_LAYERS}, not {self.layers}")
        require(
            1 <= self.width * self.mlp_ratio <= sys.maxsize,
            f"mlp_ratio {self.mlp_ratio} times width {self.width} is no width of a layer",
        )
        require(self.width % self.heads == 0, f"width {self.width} must be a multiple of heads {self.heads}")
        require(
            self.output_dim >= RESAMPLER_HEAD_SIZE and self.output_dim % self.resampler_heads == 0,
            f"output_dim {self.output_dim} must be from {RESAMPLER_HEAD_SIZE} up and divide into the resampler's heads",
        )
        require(self.output_dim % 4 == 0, f"output_dim {self.output_dim} must be a multiple of 4")
        require(
            math.isqrt(self.n_queries) ** 2 == self.n_queries,
            f"n_queries must be a square number, not {self.n_queries}",
        )

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def mlp_width(self) -> int:
        """Inner width of the vision MLP, rounded down as the reference does."""
        return int(self.width * self.mlp_ratio)

    @property
    def resampler_heads(self) -> int:
        """Attention heads of the resampler."""
        return self.output_dim // RESAMPLER_HEAD_SIZE

    @property
    def image_end_id(self) -> int:
        """Id of `</img>`."""
        return self.image_start_id + 1

    @property
    def image_pad_id(self) -> int:
        """Id of `<imgpad>`."""
        return self.image_start_id + 2


@dataclass(frozen=True)
class QuantizationConfig:
    """How the decoder's linears are packed (GPTQ, AutoGPTQ v1 layout).

    `bits` is 4 or 8. There is one scale and one zero point for each `group_size` inputs of an output, or for all of its
    inputs if that is -1. `sym` says that every zero point is the middle, `desc_act` that groups may take their inputs
    from anywhere (act-order), `lm_head` that the head is packed, too.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    quant_method: str = "gptq"
    lm_head: bool = False

    def __post_init__(self) -> None:
        require(self.quant_method == "gptq", f"quant_method {self.quant_method!r} is not supported, only 'gptq'")
        require(type(self.bits) is int and self.bits in (4, 8), f"bits must be 4 or 8, not {self.bits!r}")
        size = self.group_size
        require(
            is_whole(size) and (size > 0 or size == -1),
            f"group_size must be a positive whole number, or -1 for one scale an output, not {size!r}",
        )
        booleans(self, "sym", "desc_act", "lm_head")

    @property
    def per_word(self) -> int:
        """Values in an int32."""
        return 32 // self.bits

    def groups(self, inputs: int) -> int:
        """How many groups a linear of so many inputs has; the last may be a short one."""
        return 1 if self.group_size == -1 else -(-inputs // self.group_size)


@dataclass(frozen=True)
class QwenVLConfig:
    """config.json of a Qwen-VL checkpoint.

    Lengths are tokens. `seq_length` is the length the decoder was trained at: above it dynamic NTK and log-n scaling
    begin; `max_position_embeddings` is the longest text that is accepted, prompt and answer together. `note` is ours:
    what a checkpoint's maker wants its users to be told.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    visual: VisionConfig
    kv_channels: int = 128
    max_position_embeddings: int = 8192
    seq_length: int = 2048
    layer_norm_epsilon: float = 1e-6
    rotary_emb_base: float = 10000.0
    rotary_pct: float = 1.0
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    initializer_range: float = 0.02
    no_bias: bool = True
    scale_attn_weights: bool = True
    tie_word_embeddings: bool = False
    emb_dropout_prob: float = 0.0
    attn_dropout_prob: float = 0.0
    quantization_config: QuantizationConfig | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        positive_whole_numbers(
            self,
            *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
            *("kv_channels", "max_position_embeddings", "seq_length"),
        )
        positive_numbers(self, "layer_norm_epsilon", "rotary_emb_base", "initializer_range")
        booleans(self, "use_dynamic_ntk", "use_logn_attn")
        require(self.seq_length > 1, "seq_length must be above 1, as log-n scaling divides by its logarithm, not 1")
        layers = self.num_hidden_layers
        require(layers <= MAX_LAYERS, f"num_hidden_layers must be at most {MAX_LAYERS}, not {layers}")
        heads, size = self.num_attention_heads, self.kv_channels
        require(
            heads * size == self.hidden_size,
            f"num_attention_heads x kv_channels ({heads} x {size}) must be hidden_size {self.hidden_size}",
        )
        require(size % 2 == 0 and size > 2, f"kv_channels {size} must be even and above 2, to be rotated in pairs")
        require(self.intermediate_size % 2 == 0, f"intermediate_size {self.intermediate_size} must be even")
        require(
            self.visual.output_dim == self.hidden_size,
            f"visual.output_dim {self.visual.output_dim} must be hidden_size {self.hidden_size}",
        )
        require(
            self.visual.image_pad_id < self.vocab_size,
            f"visual.image_start_id {self.visual.image_start_id} plus 2 must be below vocab_size {self.vocab_size}",
        )
        # No published checkpoint sets these otherwise, and the reference's own code for the other values is untested.
        only = {
            "rotary_pct": 1.0,
            "no_bias": True,
            "scale_attn_weights": True,
            "tie_word_embeddings": False,
            "emb_dropout_prob": 0.0,
            "attn_dropout_prob": 0.0,
        }
        for name, value in only.items():
            require(getattr(self, name) == value, f"{name} {getattr(self, name)!r} is not supported, only {value!r}")

    @property
    def mlp_width(self) -> int:
        """Inner width of the SwiGLU: `intermediate_size` counts both of its projections."""
        return self.intermediate_size // 2

    @classmethod
    def from_dict(cls, data: Any, where: str = CONFIG_FILE) -> QwenVLConfig:  # noqa: ANN401 - parsed JSON
        """Build from parsed JSON. Raises ConfigError naming `where` and the key."""
        require(isinstance(data, dict), f"{where} must be a JSON object, not {type(data).__name__}")
        require("visual" in data, f"{where} lacks visual: it is not a Qwen-VL configuration")
        data = {**data, "visual": _from_json_object(VisionConfig, data["visual"], f"{where}: visual")}
        if (quantization := data.get("quantization_config")) is not None:
            if isinstance(quantization, dict) and (kind := quantization.get("checkpoint_format")) not in (None, "gptq"):
                # GPTQModel's "gptq_v2" has other zero points under the same names and shapes.
                raise ConfigError(
                    f"{where}: quantization_config: checkpoint_format {kind!r} is not supported, only 'gptq'"
                )
            data["quantization_config"] = _from_json_object(
                QuantizationConfig, quantization, f"{where}: quantization_config"
            )
        return _from_json_object(cls, data, where)

    @classmethod
    def load(cls, folder: str | Path) -> QwenVLConfig:
        """Read `config.json` in `folder`. Raises ConfigError."""
        path = Path(folder) / CONFIG_FILE
        return cls.from_dict(read_json(path), str(path))

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `from_dict` reads back."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


@dataclass(frozen=True)
class SamplingOptions:
    """How ids are chosen. The defaults are greedy decoding with every processor off.

    temperature           divides the logits; above 0
    top_k                 keep the k most likely ids, and those tied with the k-th; 0 is off
    top_p                 keep the smallest set of ids whose probability reaches p, at least one; 1 is off
    repetition_penalty    weakens every id that the text holds already; 1 is off
    frequency_penalty     taken off an id's score for each time that the new text holds it; from -2 to 2, 0 is off
    presence_penalty      taken off once if the new text holds it at all; from -2 to 2, 0 is off
    no_repeat_ngram_size  no run of this many ids occurs twice, the prompt included; 0 is off
    min_new_tokens        stop ids are forbidden before this many new tokens
    max_new_tokens        the answer ends after this many new tokens
    seed                  for sampling: row i of a batch draws with seed + i; None draws a fresh one

    temperature, top_k, top_p and seed matter only if `do_sample`. Lengths are tokens. Raises ConfigError for a value
    that cannot be used.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    max_new_tokens: int = 512
    seed: int | None = None

    def __post_init__(self) -> None:
        booleans(self, "do_sample")
        positive_numbers(self, "temperature", "repetition_penalty")
        require(
            is_number(self.top_p) and 0 <= self.top_p <= 1,
            f"top_p must be a number from 0 to 1 (1 is off), not {self.top_p!r}",
        )
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            require(is_number(value) and -2 <= value <= 2, f"{name} must be a number from -2 to 2, not {value!r}")
        for name, least in (("top_k", 0), ("no_repeat_ngram_size", 0), ("min_new_tokens", 0), ("max_new_tokens", 1)):
            value = getattr(self, name)
            require(is_whole(value) and value >= least, f"{name} must be a whole number from {least} up, not {value!r}")
        require(
            self.seed is None or (is_whole(self.seed) and 0 <= self.seed < 2**63),
            f"seed must be a whole number from 0 to 2**63 - 1, or None, not {self.seed!r}",
        )

    @classmethod
    def from_config(cls, config: SamplingOptions, **overrides: Any) -> SamplingOptions:  # noqa: ANN401 - any field
        """The options of `config`, with `overrides` in their place; an override of None means "not given".

        Raises ConfigError for a name that is not an option, or a value that cannot be used.
        """
        names = [option.name for option in dataclasses.fields(cls)]
        if unknown := [name for name in overrides if name not in names]:
            raise ConfigError(f"unknown option {', '.join(unknown)}: the options are {', '.join(names)}")
        values = {name: getattr(config, name) for name in names}
        return cls(**values | {name: value for name, value in overrides.items() if value is not None})


@dataclass(frozen=True)
class GenerationConfig(SamplingOptions):
    """generation_config.json: how the checkpoint's authors meant it to be decoded.

    The defaults, used when there is no such file, are greedy and ChatML. `max_window_size` is tokens.
    """

    chat_format: str = "chatml"
    eos_token_id: int | tuple[int, ...] | None = None
    max_window_size: int = 6144

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.chat_format in ("chatml", "raw"), f"chat_format must be 'chatml' or 'raw', not {self.chat_format!r}"
        )
        positive_whole_numbers(self, "max_window_size")
        if isinstance(self.eos_token_id, list):  # as JSON has it; a frozen dataclass wants something hashable
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        require(
            all(is_whole(i) and i >= 0 for i in self.eos_token_ids),
            f"eos_token_id must be an id or a list of ids, not {self.eos_token_id!r}",
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a text: none, one or several."""
        eos = self.eos_token_id
        return () if eos is None else eos if isinstance(eos, tuple) else (eos,)

    @classmethod
    def from_dict(cls, data: Any, where: str = GENERATION_CONFIG_FILE) -> GenerationConfig:  # noqa: ANN401 - parsed JSON
        """Build from parsed JSON. Raises ConfigError naming `where` and the key."""
        return _from_json_object(cls, data, where)

    @classmethod
    def load(cls, folder: str | Path) -> GenerationConfig:
        """Read `generation_config.json` in `folder`, or the defaults if there is none. Raises ConfigError."""
        path = Path(folder) / GENERATION_CONFIG_FILE
        return cls.from_dict(read_json(path), str(path)) if path.exists() else cls()
