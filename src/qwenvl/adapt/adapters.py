"""LoRA adapters on disk, as PEFT writes and reads them: a folder with a configuration and one safetensors file.

    save_adapter   write the adapter of a model
    load_adapter   check an adapter against a model, and put it in or fold it in

Tensors have PEFT's names for the reference's model ("base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"), so
that adapters can be exchanged with it in both directions. In the decoder our tensors are the reference's, by the table
in `weights/keymap.py`, so only names change. PEFT may refuse a configuration with keys that it does not know: what we
record of the base model is in the header of the safetensors file, which it does not look at.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed

from ..config import QwenVLConfig, read_json
from ..errors import CheckpointError, ConfigError
from ..files import flush_folder, whole_file
from ..model.qwenvl import QwenVL
from ..weights.checkpoint import DTYPES
from ..weights.folder import few
from ..weights.keymap import Shape, entries
from .lora import (
    LoraLinear,
    LoraOptions,
    add_lora,
    check_fits,
    check_mergeable,
    decoder_linears,
    lora_layers,
    matches,
    merge_lora,
    put_weight,
    target_paths,
    wrap_linears,
)

ADAPTER_CONFIG_FILE, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
EMBEDDINGS = {"transformer.wte": "decoder.wte", "lm_head": "decoder.lm_head"}
# In the header, as JSON lists: some values of the base model, of weights that packing leaves alone and of those that
# adapters are folded into.
_BASE_KEY, _LINEARS_KEY = "qwenvl_base", "qwenvl_base_linears"
_SAMPLED = 8  # values of each tensor that is sampled
_ROUNDING = 2**-7  # twice what rounding to bfloat16 can change: a base may be loaded in another dtype than before
# What PEFT's configuration may say without changing what an adapter computes, once it is trained.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying", "runtime_config"),
    *("eva_config", "loftq_config", "corda_config", "lora_ga_config"),  # how A and B began
}
_READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "bias"),
    "init_lora_weights",
}
# Beginnings that leave the base model's weights alone; the others (pissa, olora, ...) take something out of them.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _Slot:
    """Where one tensor of an adapter belongs: the module's path in our model, its parameter, and the shape."""

    path: str
    parameter: str
    shape: Shape


def save_adapter(model: QwenVL, folder: str | Path, base_name: str | None = None) -> None:
    """Write the model's adapter as a PEFT folder, whole or not at all.

    base_name: the base model's hub id or folder, for the configuration's `base_model_name_or_path`.

    A model that is sharded is gathered tensor by tensor: every process must call this, and the first one writes.
    Raises ConfigError if the model has no adapter, CheckpointError if `folder` is in use or cannot be written.
    """
    layers = lora_layers(model)
    if not layers:
        raise ConfigError("the model has no LoRA adapters to save")
    options = next(iter(layers.values())).options
    tensors = {
        name: _gathered(model.get_submodule(slot.path).get_parameter(slot.parameter))
        for name, slot in _slots(model, options).items()
    }
    base = {_BASE_KEY: json.dumps(_base_sample(model)), _LINEARS_KEY: json.dumps(_linears_sample(model))}
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0:
        return
    config = json.dumps(_peft_config(model.config, options, base_name), indent=2) + "\n"
    _write(Path(os.path.abspath(folder)), config, tensors, {"format": "pt"} | base)


@torch.no_grad()
def load_adapter(model: QwenVL, folder: str | Path, *, merge: bool = False, trainable: bool = False) -> None:
    """Put the adapter of a PEFT folder into a loaded model, in place.

    merge: fold it in at once; the model's linears stay plain, and as fast as before.
    trainable: freeze all else and go on training it, as after `add_lora`. Without it, embeddings that were trained
        beside the adapter get the model's dtype, and the adapter is frozen.

    Of an adapter that was saved here, some values of its base model are compared, too; one that PEFT wrote is known by
    its names and shapes only. Raises ConfigError for a configuration that is not plain LoRA or not for this model,
    CheckpointError for tensors that are missing, unknown, wrongly shaped, damaged, pickled, or of another base. The
    model is unchanged then.
    """
    if merge and trainable:
        raise ConfigError("an adapter that is merged cannot be trained: choose merge or trainable")
    folder = Path(folder)
    options = _read_options(folder / ADAPTER_CONFIG_FILE, model.config)
    if merge:
        check_mergeable(model, target_paths(model.config, options.targets).values())
    tensors = _read_tensors(_weight_file(folder), model, options)
    if trainable:
        add_lora(model, options)
    else:
        wrap_linears(model, options)
    for slot, tensor in tensors:
        owner = model.get_submodule(slot.path)
        put_weight(owner, slot.parameter, tensor, owner.get_parameter(slot.parameter).dtype)
    if not trainable:
        for layer in lora_layers(model).values():
            layer.lora_A.requires_grad_(False)
            layer.lora_B.requires_grad_(False)
    if merge:
        merge_lora(model)


def _slots(model: QwenVL, options: LoraOptions) -> dict[str, _Slot]:
    """Every tensor of the adapter, by PEFT's name."""
    slots = {}
    for reference, path in target_paths(model.config, options.targets).items():
        linear: Any = model.get_submodule(path)
        for parameter, shape in (
            ("lora_A", (options.r, linear.in_features)),
            ("lora_B", (linear.out_features, options.r)),
        ):
            slots[f"base_model.model.{reference}.{parameter}.weight"] = _Slot(path, parameter, shape)
    if options.train_embeddings:
        shape = (model.config.vocab_size, model.config.hidden_size)
        slots |= {f"base_model.model.{r}.weight": _Slot(path, "weight", shape) for r, path in EMBEDDINGS.items()}
    return slots


def _gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded, on the CPU and contiguous."""
    whole = getattr(tensor, "full_tensor", None)
    return (tensor if whole is None else whole()).detach().cpu().contiguous()


def _base_sample(model: QwenVL) -> list[float]:
    """Some values of the weights that no adapter changes and no packing rounds: by them a base is known again."""
    kinds = "attn.c_attn.bias", "conv1.weight", "resampler.query"
    paths = [entry.ours for entry in entries(model.config) if ".ln_" in entry.ours or entry.ours.endswith(kinds)]
    return [value for path in paths for value in _sample(model, path)]


def _linears_sample(model: QwenVL) -> list[float]:
    """Some values of the decoder's linears as bfloat16 has them, whatever the base was loaded in; none if packed.

    A base with an adapter folded in differs from the one without in these alone.
    """
    if model.config.quantization_config is not None:
        return []
    paths = [f"{path}.weight" for path in decoder_linears(model.config).values()]
    return [value for path in paths for value in _sample(model, path, torch.bfloat16)]


def _sample(model: QwenVL, path: str, dtype: torch.dtype = torch.float32) -> list[float]:
    owner_path, _, name = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    tensor = getattr(owner.base if isinstance(owner, LoraLinear) else owner, name).detach()
    whole = getattr(tensor, "full_tensor", None)
    tensor = tensor if whole is None else whole()
    first: list[float] = tensor[(0,) * (tensor.dim() - 1)][:_SAMPLED].to(dtype).tolist()
    return first


def _peft_config(config: QwenVLConfig, options: LoraOptions, base_name: str | None) -> dict[str, Any]:
    """adapter_config.json, with keys that every version of PEFT knows."""
    # A target that also names something outside the decoder ("mlp.c_proj" is in the vision tower, too) is spelled out.
    linears = decoder_linears(config)
    others = {entry.reference.rpartition(".")[0] for entry in entries(config)} - linears.keys()
    targets: list[str] = []
    for target in options.targets:
        ambiguous = any(matches(target, path) for path in others)
        targets += [path for path in linears if matches(target, path)] if ambiguous else [target]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": options.r,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": targets,
        "modules_to_save": [path.split(".")[-1] for path in EMBEDDINGS] if options.train_embeddings else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _write(folder: Path, config: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write both files into a folder that gets its name last."""
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise CheckpointError(f"{folder} exists and holds something else; remove it or name another folder")
        partial.mkdir(parents=True, exist_ok=True)
        known = (ADAPTER_CONFIG_FILE, ADAPTER_FILE)
        if foreign := sorted(path.name for path in partial.iterdir() if not path.name.startswith(known)):
            raise CheckpointError(f"{partial} holds files that are not an adapter's ({few(foreign)}); move them away")
        for left in partial.iterdir():  # by a run that was killed
            left.unlink()
        save_file(tensors, partial / ADAPTER_FILE, metadata)
        with open(partial / ADAPTER_FILE, "rb+") as written:
            os.fsync(written.fileno())
        with whole_file(partial / ADAPTER_CONFIG_FILE) as file:
            file.write(config.encode())
        if folder.is_dir():  # an empty one
            folder.rmdir()
        os.rename(partial, folder)
        flush_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write the adapter {folder}: {reason}") from None


def _read_options(path: Path, config: QwenVLConfig) -> LoraOptions:
    """What a PEFT configuration asks for. Raises ConfigError if that is not plain LoRA on this decoder."""
    if not path.is_file():
        raise ConfigError(f"{path.parent} has no {path.name}: it is not the folder of a PEFT adapter")
    data = read_json(path)
    kind = data.get("peft_type") if isinstance(data, dict) else None
    if kind != "LORA":
        raise ConfigError(f"{path}: peft_type is {kind!r}, and only 'LORA' can be loaded")
    # Unknown keys are refused where they say anything: whatever PEFT invents next, most likely it changes the sum.
    odd = [name for name, value in data.items() if value and name not in _READ | _HARMLESS]
    odd += ["bias"] if data.get("bias", "none") != "none" else []
    odd += ["init_lora_weights"] if data.get("init_lora_weights") not in _INITIALISATIONS else []
    if odd:
        raise ConfigError(f"{path} asks for {few(odd)}, but only plain LoRA, W + alpha / r * B A, can be loaded")
    saved = data.get("modules_to_save") or []
    if saved not in ([], ["wte", "lm_head"], ["lm_head", "wte"]):
        raise ConfigError(f"{path}: modules_to_save is {saved!r}, but only wte and lm_head can be, both or neither")
    try:
        options = LoraOptions(
            r=data.get("r"),
            alpha=data.get("lora_alpha"),
            dropout=data.get("lora_dropout", 0.0),
            targets=_read_targets(data.get("target_modules"), config),
            train_embeddings=bool(saved),
        )
        check_fits(config, options)
    except ConfigError as error:
        raise ConfigError(f"{path} does not fit this model: {error}") from None
    return options


def _read_targets(given: object, config: QwenVLConfig) -> Any:  # noqa: ANN401 - LoraOptions checks it
    """PEFT's targets: a list as it is; of a regular expression, the paths that it matches."""
    if not isinstance(given, str):
        return given
    try:
        paths = tuple(path for path in decoder_linears(config) if re.fullmatch(given, path))
    except re.error as error:
        raise ConfigError(f"target_modules is not a regular expression ({error})") from None
    return paths or (given,)


def _weight_file(folder: Path) -> Path:
    path = folder / ADAPTER_FILE
    if path.is_file():
        return path
    pickled = path.with_suffix(".bin")
    if pickled.is_file():
        raise CheckpointError(
            f"{pickled} is a pickle, which could run code, and is refused: rewrite it with "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), ...) as adapter_model.safetensors"
        )
    raise CheckpointError(f"{folder} has no {ADAPTER_FILE}: the adapter is incomplete; save or fetch it again")


def _read_tensors(path: Path, model: QwenVL, options: LoraOptions) -> list[tuple[_Slot, Tensor]]:
    """Check the file against the model; return its tensors and where they belong."""
    try:
        opened: Any = safe_open(path, framework="pt")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); save or fetch it again") from None
    slots = _slots(model, options)
    stored = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    misshaped = [
        f"{name} is {shape} and should be {list(slots[name].shape)}"
        for name, shape in ((name, list(tensor.get_shape())) for name, tensor in stored.items() if name in slots)
        if shape != list(slots[name].shape)
    ]
    dtypes = {name: DTYPES.get(tensor.get_dtype()) for name, tensor in stored.items()}
    problems = {
        "missing": [name for name in slots if name not in stored],
        "unknown": [name for name in stored if name not in slots],
        "wrongly shaped": misshaped,
        "of a dtype that it cannot have": [
            name for name, dtype in dtypes.items() if not (dtype and dtype.is_floating_point)
        ],
    }
    if found := [
        f"{len(names)} tensor{'s' if len(names) > 1 else ''} {what}: {few(names)}"
        for what, names in problems.items()
        if names
    ]:
        raise CheckpointError(f"{path} is not an adapter for this model: {'; '.join(found)}")
    _check_base(path, opened.metadata() or {}, model)
    return [(slot, opened.get_tensor(name)) for name, slot in slots.items()]


def _check_base(path: Path, header: dict[str, str], model: QwenVL) -> None:
    """Refuse an adapter whose base had other weights, as far as the recorded samples can tell."""
    recorded, linears = (_numbers(path, key, header) for key in (_BASE_KEY, _LINEARS_KEY))
    same = recorded is None or _alike(recorded, _base_sample(model), _ROUNDING)
    here = _linears_sample(model)
    if linears is not None and len(linears) and here:  # neither base is packed
        half = model.decoder.ln_f.weight.dtype == torch.float16  # through which bfloat16 values do not pass unchanged
        same = same and _alike(linears, here, _ROUNDING if half else 0.0)
    if not same:
        name = read_json(path.with_name(ADAPTER_CONFIG_FILE)).get("base_model_name_or_path")
        raise CheckpointError(f"{path} was trained on another base model, {name or 'unnamed'}: load that one under it")


def _numbers(path: Path, key: str, header: dict[str, str]) -> Tensor | None:
    """A list in the header; None if it is not there."""
    if key not in header:
        return None
    try:
        return torch.tensor(json.loads(header[key]), dtype=torch.float32)
    except (ValueError, TypeError, OverflowError, RuntimeError):
        raise CheckpointError(f"{path} is damaged: its header's {key} is not a list of numbers") from None


def _alike(then: Tensor, now: list[float], rounding: float) -> bool:
    return then.shape == (len(now),) and torch.allclose(
        then, torch.tensor(now), rtol=rounding, atol=1e-6 * bool(rounding)
    )
