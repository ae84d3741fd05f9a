"""The same decoder in `transformers`, where that is installed: its Llama implementation at this shape, random weights.

Nothing here needs `transformers`, and nothing else imports it. Llama differs from this decoder in what costs no time:
the bias of the first projection, log-n factors, NTK. It is given random ids and no picture, as many as a picture takes.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ..config import QwenVLConfig
from .device import Device, name_of
from .figures import Event, Figure, Missing
from .plan import Plan
from .roofline import Limits, stepping

FEWEST = 8  # tokens


@torch.no_grad()
def measure_llama(
    config: QwenVLConfig, dtype: torch.dtype, device: Device, limits: Limits, plan: Plan, seconds: float
) -> Iterator[Event]:
    """New tokens a second: of plain `generate`, and of `generate` with its static cache, which it compiles on a GPU.

    Both behind as many ids as a picture takes, prefill included. The static cache's first call, in which it is
    compiled, may take a minute; should it not come back, the process is stopped and what was measured stays.
    """
    begin = device.clock()
    transformers = importlib.import_module("transformers")
    model = _llama(transformers, config, dtype, device)
    prompt = config.visual.n_queries + 2
    ids = torch.randint(0, config.vocab_size, (1, prompt), device=device.torch)

    def generate(tokens: int, **options: str) -> float:
        start = device.now()
        new = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        assert new.shape[1] == prompt + tokens, "transformers stopped early"
        return device.now() - start

    def figure(name: str, tokens: int, taken: float, first: float) -> Figure:
        work = stepping(config, dtype.itemsize, 1, prompt + (tokens + 1) / 2)
        subject, rate = f"transformers {transformers.__version__}, {name_of(dtype)}", round(tokens / taken, 2)
        told = Figure("transformers", subject, f"Llama, {name}, {tokens}", rate, "tok/s", warm_up=round(first, 3))
        return limits.hold(replace(told, note="prefill included"), work)

    first = generate(FEWEST)
    each = generate(FEWEST) / FEWEST
    tokens = min(plan.peer_tokens, max(FEWEST, int(seconds / 3 / each)))
    yield figure("generate", tokens, generate(tokens), first)
    # The shapes that are compiled depend on the cache's length: the first call has as many tokens as the second.
    first = generate(tokens, cache_implementation="static")
    if device.clock() - begin + tokens * each > seconds:
        reason = f"no time for a second call of the static cache: the first took {first:.0f} s"
        yield Missing("transformers", "transformers", reason, failed=False)
        return
    yield figure("static cache", tokens, generate(tokens, cache_implementation="static"), first)


def _llama(transformers: Any, config: QwenVLConfig, dtype: torch.dtype, device: Device) -> Any:  # noqa: ANN401
    """The model with the random weights that it is made with, drawn on the device."""
    shape = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        head_dim=config.kv_channels,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.layer_norm_epsilon,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,  # it never ends early
        pad_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device.torch):
            return transformers.LlamaForCausalLM(shape).eval()
    finally:
        torch.set_default_dtype(before)
