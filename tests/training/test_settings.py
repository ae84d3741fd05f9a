"""The settings of `qwenvl train`: one source of names and defaults, and TOML in both directions."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from support import one_line_error

from qwenvl.adapt.lora import LoraOptions
from qwenvl.errors import ConfigError
from qwenvl.training.options import TrainingOptions
from qwenvl.training.settings import TrainSettings, read_toml, to_toml


def test_defaults_are_the_parts_own() -> None:
    """Every option of the trainer and of LoRA is a setting, with the same default: neither list grows alone."""
    assert TrainSettings().training == TrainingOptions()
    assert TrainSettings().lora == LoraOptions()
    lora = {setting.name.removeprefix("lora_") for setting in fields(TrainSettings) if setting.name.startswith("lora_")}
    assert lora == {option.name for option in fields(LoraOptions)}


def test_settings_reach_the_parts() -> None:
    """Values arrive in the options under their names."""
    settings = TrainSettings(steps=7, betas=(0.8, 0.9), lora_r=3, lora_targets=("w1",), lora_train_embeddings=True)
    assert settings.training == TrainingOptions(steps=7, betas=(0.8, 0.9))
    assert settings.lora == LoraOptions(r=3, targets=("w1",), train_embeddings=True)


@pytest.mark.parametrize(
    "settings",
    [
        TrainSettings(),
        TrainSettings(data='a "b" \\ 猫😀\t\x7f.json', epochs=0.5, learning_rate=1e-7, max_minutes=8, merge=True),
        TrainSettings(method="full", train_vision=True, lora_targets=("w1", "h.0.mlp.w2"), betas=(0.5, 0.75)),
    ],
)
def test_toml_there_and_back(settings: TrainSettings, tmp_path: Path) -> None:
    """What is written is valid TOML, names every setting, and is read back as what it was."""
    path = tmp_path / "train.toml"
    path.write_text(to_toml(settings), encoding="utf-8")
    assert TrainSettings(**read_toml(path)) == settings
    for setting in fields(TrainSettings):
        assert f"{setting.name} =" in to_toml(settings)
        assert setting.metadata["help"] in to_toml(settings)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("learning_rat = 1", ("no setting 'learning_rat'", "'learning_rate'")),
        ("batch-size = 1", ("'batch-size'", "'batch_size'")),
        ("[lora]\nr = 1", ("'lora'", "lora_r")),
        ("steps = ", ("not valid TOML",)),
        (b"\xff", ("not valid TOML",)),
    ],
)
def test_bad_files(content: str | bytes, says: tuple[str, ...], tmp_path: Path) -> None:
    """An unknown key is an error that names it and the nearest that there is; so is a file that is no TOML."""
    path = tmp_path / "train.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with one_line_error(ConfigError, path, *says):
        read_toml(path)


def test_byte_order_mark(tmp_path: Path) -> None:
    """Editors on Windows begin a file with a mark, which was an invalid statement on line 1."""
    path = tmp_path / "train.toml"
    path.write_bytes(b"\xef\xbb\xbf" + b"steps = 3\n")
    assert read_toml(path) == {"steps": 3}


def test_on_error_may_change() -> None:
    """A run that a broken picture ended goes on with `--on-error skip`, as the error advises; it used to be refused."""
    assert TrainSettings(on_error="skip").differences(TrainSettings()) == []


def test_missing_file(tmp_path: Path) -> None:
    """A file that is not there is one line."""
    with one_line_error(ConfigError, "cannot read", tmp_path / "no.toml"):
        read_toml(tmp_path / "no.toml")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": 3}, "data must be a text"),
        ({"model": ""}, "model must be a text"),
        ({"method": "prefix"}, "method must be one of full, lora, qlora"),
        ({"on_error": "ignore"}, "on_error must be one of fatal, skip"),
        ({"merge": 1}, "merge must be true or false"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"steps": True}, "steps must be a whole number"),
        ({"learning_rate": "fast"}, "learning_rate must be a number"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number"),
        ({"betas": [0.9]}, "betas must be a list of two numbers"),
        ({"lora_targets": "w1"}, "lora_targets must be a list of texts"),
        ({"method": "qlora", "merge": True}, "merge is for method lora"),
        ({"train_vision": True}, "train_vision is for method full"),
    ],
)
def test_values_that_cannot_be_used(changes: dict[str, Any], says: str) -> None:
    """A value of another type, as a TOML file may have it, is named with what it should be."""
    with one_line_error(ConfigError, says):
        TrainSettings(**changes)


def test_differences() -> None:
    """A run may go on with other intervals, devices and folders, and not with another seed."""
    settings = TrainSettings(seed=0)
    free = replace(settings, workers=0, max_minutes=1.0, output="x", device="cpu", keep=1)
    assert free.differences(settings) == []
    assert replace(settings, seed=1, lora_alpha=3).differences(settings) == [
        "lora_alpha was 16 and is 3",
        "seed was 0 and is 1",
    ]
