"""The pictures of a conversation: by name in histories, which are JSON; as pixels for the model.

PictureStore   where those are kept that were given as objects or fetched
stored         a part that names its picture
pixels_of      what the model sees of a prompt's pictures
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, MutableMapping
from typing import TypeAlias

from PIL import Image
from torch import Tensor

from .errors import PromptError
from .image import ImagePolicy, image_hash, open_image, preprocess
from .text.parts import Part
from .text.prompt import Prompt

PictureStore: TypeAlias = MutableMapping[str, Image.Image]
STORED = "image:"  # how the names begin under which pictures are kept in a store


def stored(part: Part, store: PictureStore, policy: ImagePolicy) -> Part:
    """A part whose picture is a str: the path or URL that it was, or the name of a picture put into the store."""
    source = part.get("image", "")
    if isinstance(source, str):
        return part
    if isinstance(source, os.PathLike):
        return {**part, "image": os.fspath(source)}
    picture = open_image(source, policy)
    name = f"{STORED}{hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()[:32]}"
    store[name] = picture
    return {**part, "image": name}


def pixels_of(
    prompt: Prompt,
    store: PictureStore,
    size: int,
    policy: ImagePolicy,
    *,
    look: Callable[[Image.Image], None] = lambda _: None,
) -> list[tuple[str, Tensor]]:
    """Hash and pixels [3,size,size] of every picture of a prompt, in order. Raises PromptError, ImageError.

    `look` sees each of them when it has been opened, before the next one is.
    """
    pictures = []
    for source in prompt.images:
        picture = store.get(source) if isinstance(source, str) else None
        if picture is None:
            if isinstance(source, str) and source.startswith(STORED):
                raise PromptError(f"the history shows a picture {source} that the image store does not hold")
            picture = open_image(source, policy)
            if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
                store[source] = picture  # fetched once for as long as the store is kept, not once a round
        look(picture)
        pixels = preprocess(picture, size, policy)
        pictures.append((image_hash(pixels), pixels))
    return pictures
