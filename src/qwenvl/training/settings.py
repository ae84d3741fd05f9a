"""What `qwenvl train` is told, by a TOML file and by flags: one dataclass has every name, default and line of help.

    TrainSettings   a whole run, valid once it exists
    read_toml       the settings in a file
    to_toml         settings as a file that says them all

Torch is not imported before `training` or `lora` is asked for: `qwenvl train --help` should answer at once.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from ..checks import is_number, is_whole
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..adapt.lora import LoraOptions
    from .options import TrainingOptions

SETTINGS_FILE = "train.toml"  # in an output folder
LORA = "lora_"  # how LoRA's options begin here


def _setting(default: Any, help: str, *, group: str = "", free: bool = False) -> Any:  # noqa: ANN401 - as `field`
    """A field with its help; a `free` one may differ when a run is gone on with: it says where or how fast."""
    return field(default=default, metadata={"help": help, "group": group, "free": free})


@dataclass(frozen=True)
class TrainSettings:
    """One training run. Paths are relative to the current folder. Raises ConfigError for a value that cannot be used.

    The part that is TrainingOptions and the part that is LoraOptions have the defaults of those.
    """

    model: str = _setting("tiny", "what to begin with: hub id, folder or tiny", group="what")
    revision: str | None = _setting(None, "branch, tag or commit of a checkpoint on a hub")
    cache_dir: str | None = _setting(None, "where checkpoints from a hub are kept", free=True)
    data: str | None = _setting(None, "conversations to learn: a JSON list or JSON lines")
    evaluation_data: str | None = _setting(None, "conversations whose loss is logged on the way", free=True)
    image_root: str | None = _setting(None, "what pictures' paths are relative to; not set: the data file's folder")
    on_error: Literal["fatal", "skip"] = _setting("fatal", "what a bad record or picture does", free=True)
    max_length: int = _setting(2048, "tokens after which a conversation is cut")
    output: str | None = _setting(None, "folder for the log, checkpoints and the result", free=True)

    method: Literal["full", "lora", "qlora"] = _setting(
        "lora", "all weights, or an adapter beside them, or one over a packed checkpoint", group="how"
    )
    train_vision: bool = _setting(False, "full: train the vision tower and the resampler's output too")
    merge: bool = _setting(False, "lora: write a whole checkpoint with the adapter in it, too", free=True)
    device: str = _setting("auto", "auto, cpu, cuda, cuda:1, mps", free=True)
    dtype: str = _setting("auto", "of the weights: auto (full: float32; lora on CUDA: bfloat16), float32, bfloat16")

    lora_r: int = _setting(64, "rank", group="LoRA")
    lora_alpha: float = _setting(16, "scale, divided by the rank")
    lora_dropout: float = _setting(0.05, "share of an adapter's inputs that is dropped")
    lora_targets: tuple[str, ...] = _setting(
        ("c_attn", "attn.c_proj", "w1", "w2"), "the decoder's linears that get an adapter"
    )
    lora_train_embeddings: bool = _setting(False, "train the token table and the head in full: for the base model")

    steps: int | None = _setting(None, "updates of the weights; or", group="training")
    epochs: float | None = _setting(None, "passes over the data; not set, and no steps: 1")
    batch_size: int = _setting(16, "samples of one update, over all devices and accumulation steps together")
    accumulation: int = _setting(1, "pieces into which a device's share of a batch is cut to save memory", free=True)
    learning_rate: float = _setting(1e-5, "at its peak")
    final_ratio: float = _setting(0.0, "the learning rate at the end, as a part of the peak")
    warmup_steps: int | None = _setting(None, "updates until the peak; not set: one in a hundred of all")
    weight_decay: float = _setting(0.1, "of matrices")
    betas: tuple[float, float] = _setting((0.9, 0.95), "of AdamW")
    clip: float = _setting(1.0, "largest norm of the gradient; 0 is off")
    precision: str = _setting("auto", "of the products: float32, bfloat16, auto (bfloat16 on CUDA)")
    activation_checkpointing: bool = _setting(False, "compute activations twice rather than keep them", free=True)
    seed: int = _setting(0, "of the data's order and every random number")
    workers: int = _setting(2, "processes that decode pictures", free=True)
    log_every: int = _setting(10, "updates from one line of the log to the next", free=True)
    evaluate_every: int = _setting(500, "updates from one evaluation to the next; 0: at the end alone", free=True)
    save_every: int = _setting(500, "updates from one checkpoint to the next; 0: at the end alone", free=True)
    keep: int = _setting(3, "checkpoints that are kept", free=True)
    max_minutes: float | None = _setting(None, "stop after this long; the same command goes on", free=True)

    def __post_init__(self) -> None:
        for name, hint in hints().items():
            value = getattr(self, name)
            if isinstance(value, list):  # TOML's
                value = tuple(value)
                object.__setattr__(self, name, value)
            if (wanted := _mismatch(value, hint)) is not None:
                raise ConfigError(f"{name} must be {wanted}, not {value!r}")
        if self.merge and self.method != "lora":
            raise ConfigError(f"merge is for method lora, not {self.method}: " + _MERGE_ADVICE[self.method])
        if self.train_vision and self.method != "full":
            raise ConfigError(f"train_vision is for method full: {self.method} adapts the decoder alone")

    @property
    def training(self) -> TrainingOptions:
        """The trainer's part. Raises ConfigError."""
        from .options import TrainingOptions

        return TrainingOptions(**{option.name: getattr(self, option.name) for option in fields(TrainingOptions)})

    @property
    def lora(self) -> LoraOptions:
        """LoRA's part. Raises ConfigError."""
        from ..adapt.lora import LoraOptions

        return LoraOptions(**{option.name: getattr(self, LORA + option.name) for option in fields(LoraOptions)})

    def differences(self, earlier: TrainSettings) -> list[str]:
        """What makes this another run than an earlier one, for a message: `seed was 0 and is 1`."""
        return [
            f"{setting.name} was {was!r} and is {now!r}"
            for setting in fields(self)
            if not setting.metadata["free"]
            and (was := getattr(earlier, setting.name)) != (now := getattr(self, setting.name))
        ]


_MERGE_ADVICE = {
    "full": "it writes a whole checkpoint anyway",
    "qlora": "packed weights cannot take an adapter in; use the adapter beside them",
}


@lru_cache(maxsize=1)
def hints() -> dict[str, Any]:
    """The type of every setting."""
    return get_type_hints(TrainSettings)


def settings_by_group() -> Iterator[tuple[str, Field[Any]]]:
    """Every setting in order, with the name of its group."""
    group = ""
    for setting in fields(TrainSettings):
        group = setting.metadata["group"] or group
        yield group, setting


def without_none(hint: Any) -> Any:  # noqa: ANN401 - a type
    """`int` for `int | None`, others as they are."""
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    return kinds[0] if type(None) in get_args(hint) else hint


def _mismatch(value: object, hint: Any) -> str | None:  # noqa: ANN401 - a type
    """What a value of this type is called, if `value` is not one."""
    if value is None and type(None) in get_args(hint):
        return None
    hint = without_none(hint)
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return None if isinstance(value, str) and value in choices else f"one of {', '.join(choices)}"
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if kinds[-1] is Ellipsis:
            return None if isinstance(value, tuple) and all(isinstance(v, str) for v in value) else "a list of texts"
        fits = isinstance(value, tuple) and len(value) == len(kinds) and all(map(is_number, value))
        return None if fits else "a list of two numbers"
    called, fits = {
        str: ("a text", isinstance(value, str) and value != ""),
        bool: ("true or false", isinstance(value, bool)),
        int: ("a whole number", is_whole(value)),
        float: ("a number", is_number(value)),
    }[hint]
    return None if fits else called


def read_toml(path: str | Path) -> dict[str, Any]:
    """The settings that a file gives, by name. Raises ConfigError for one that is no TOML or has an unknown key."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            raise ConfigError(f"to read {path}, Python 3.10 needs tomli: pip install 'qwenvl[train]'") from None
    try:
        given: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # not UTF-8 either
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    names = [setting.name for setting in fields(TrainSettings)]
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(key.replace("-", "_"), names, n=1, cutoff=0.0)
            raise ConfigError(f"{path}: there is no setting {key!r}; the nearest is {near[0]!r}")
    return given


def to_toml(settings: TrainSettings) -> str:
    """Every setting with its help; those that are not set stand in a comment."""
    lines: list[str] = []
    latest = ""
    for group, setting in settings_by_group():
        if group != latest:
            lines += ["", f"# ---- {group}"]
            latest = group
        value = getattr(settings, setting.name)
        assigned = f"# {setting.name} =" if value is None else f"{setting.name} = {_toml(value)}"
        lines.append(f"{assigned}  # {setting.metadata['help']}")
    return "\n".join(lines[1:]) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):  # JSON's escapes are TOML's, but for one character that JSON leaves as it is
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
