"""A picture, conversations about it and a configuration: what training takes, to look at and to try.

write_example   the three files, in a folder
"""

from __future__ import annotations

import json
from pathlib import Path

from ..demo import draw_scene
from ..draw import save_image
from ..errors import ConfigError
from ..files import whole_file
from ..text.boxes import to_thousandths
from .settings import SETTINGS_FILE, TrainSettings, to_toml

PICTURE, DATA = "scene.png", "conversations.jsonl"


def write_example(folder: str | Path) -> None:
    """Write scene.png, conversations.jsonl and train.toml (LoRA over the embedded model, ten updates) into `folder`.

    Raises ConfigError if the folder cannot be written or has such files already.
    """
    folder = Path(folder)
    if existing := [name for name in (PICTURE, DATA, SETTINGS_FILE) if (folder / name).exists()]:
        raise ConfigError(f"{folder} has {', '.join(existing)} already; name another folder")
    scene, shapes = draw_scene()
    records = []
    for shape in shapes:
        x1, y1, x2, y2 = to_thousandths(shape, *scene.size)
        question = f"Picture 1: <img>{PICTURE}</img>\nBox the {shape.label}."
        answer = f"<ref>the {shape.label}</ref><box>({x1},{y1}),({x2},{y2})</box>"
        messages = [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
        records.append({"id": shape.label, "conversations": messages})
    settings = TrainSettings(
        data=str(folder / DATA),
        output=str(folder / "run"),
        max_length=512,
        steps=10,
        batch_size=3,
        learning_rate=1e-3,
        lora_r=8,
        workers=0,
        log_every=5,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_image(scene, folder / PICTURE)
        with whole_file(folder / DATA) as file:
            file.write("".join(json.dumps(record) + "\n" for record in records).encode())
        with whole_file(folder / SETTINGS_FILE) as file:
            file.write(to_toml(settings).encode())
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or folder}: {error.strerror}") from None
