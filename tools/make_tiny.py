"""Make the embedded checkpoint `weights/tiny`: a Qwen-VL of about a million random, untrained weights. See `--help`.

It exists so that every command, demo and test runs the real path (picture, vision tower, resampler, decoder, tags)
with no download. Its answers are noise, and its `config.json` says so. The same command gives the same bytes.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from pathlib import Path

import torch
from tiktoken._educational import bpe_train

from qwenvl.config import GENERATION_CONFIG_FILE, QwenVLConfig, VisionConfig
from qwenvl.errors import QwenVLError
from qwenvl.model.qwenvl import QwenVL
from qwenvl.text.tokenizer import PATTERN, SPECIALS, VOCABULARY_FILE
from qwenvl.weights.write import save

MERGES = 512  # the 256 single bytes among them
NOTE = "untrained: random weights, made to exercise every step without a download; its answers are noise"

# What the merges are learned from: the words of simple questions about pictures, in English and Chinese.
COLOURS = {"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "orange": "橙色"}
SHAPES = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "rectangle": "长方形"}
SENTENCES = (
    "What is in the picture? There is a {c} {s} in the picture, and a {c} {s} above it.",
    "Where is the {c} {s}? How many {s}s are there? Which colour is the {s}? What shape is the {c} one?",
    "Is there a {c} {s}? Yes, there is. No, there is not. Read the text. Compare the two pictures.",
    "You are a helpful assistant. system user assistant Picture 1: Describe the image in English:",
    "图中有什么？图中有一个{k}的{z}。有几个{z}？{k}的{z}在哪里？框出图中{k}的{z}。有没有{z}？有。没有。",
)


def corpus() -> str:
    """The sentences with every colour and shape in them."""
    return "\n".join(
        sentence.format(c=colour, s=shape, k=COLOURS[colour], z=SHAPES[shape])
        for colour in COLOURS
        for shape in SHAPES
        for sentence in SENTENCES
    )


def config() -> QwenVLConfig:
    """The architecture, at a size that a CPU runs in milliseconds."""
    return QwenVLConfig(
        vocab_size=-(-(MERGES + len(SPECIALS)) // 16) * 16,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        kv_channels=32,
        intermediate_size=704,
        visual=VisionConfig(
            image_size=112,
            width=64,
            layers=2,
            heads=4,
            output_dim=128,
            image_start_id=MERGES + SPECIALS.index("<img>"),
            n_queries=64,
        ),
        note=NOTE,
    )


def main() -> int:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python tools/make_tiny.py weights/tiny",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("destination", help="the folder to write; must not hold anything else")
    parser.add_argument("--seed", type=int, default=2308, help="default: %(default)s")
    given = parser.parse_args()

    ranks = bpe_train(corpus(), MERGES, PATTERN, visualise=None)
    vocabulary = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    eos = MERGES + SPECIALS.index("<|endoftext|>")
    generation = {"chat_format": "chatml", "eos_token_id": eos, "pad_token_id": eos, "max_new_tokens": 32}
    torch.manual_seed(given.seed)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in QwenVL(config()).state_dict().items()}
    try:
        save(
            weights,
            given.destination,
            config(),
            {
                VOCABULARY_FILE: vocabulary,
                GENERATION_CONFIG_FILE: (json.dumps(generation, indent=2) + "\n").encode(),
            },
        )
    except QwenVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in Path(given.destination).iterdir())
    print(f"wrote {given.destination}: {sum(t.numel() for t in weights.values()):,} parameters, {size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
