"""A plain eager formulation of the reference's algorithm, to be timed against: what its remote code does, op by op.

`c_attn` fused, `w1` and `w2` apart, additive masks, softmax(QK)V spelled out, a cache that grows by `torch.cat`, logits
at every position. It runs on the very weights of a `QwenVL`, batch 1, eval mode, and returns the same numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from qwenvl.model.decoder import Block
from qwenvl.model.qwenvl import QwenVL
from qwenvl.model.rope import inverse_frequencies, ntk_alpha
from qwenvl.model.vision import VisionBlock, resize_positions

Past = list[tuple[Tensor, Tensor]]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The reference's norm, in float32."""
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * weight


def rotate_half(x: Tensor) -> Tensor:
    """(-x2, x1)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(QK / sqrt(D) + mask) V, spelled out."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ value


class EagerReference:
    """The reference's forward over a `QwenVL`'s weights."""

    def __init__(self, model: QwenVL) -> None:
        self.model, self.config = model, model.config
        config = self.config
        positions = torch.arange(1, 32768, dtype=torch.float64)
        table = (positions.log() / math.log(config.seq_length)).clamp(min=1)
        self.logn = table.float()[None, :, None, None]
        self.build_tables(1)

    def build_tables(self, prompt_length: int) -> None:
        """Cosines and sines under the prompt's alpha, twice as long as the prompt, kept while decoding."""
        alpha = ntk_alpha(prompt_length, self.config.seq_length)
        frequencies = inverse_frequencies(self.config.kv_channels, self.config.rotary_emb_base, alpha)
        angles = torch.outer(torch.arange(2 * prompt_length).float(), frequencies)
        angles = torch.cat((angles, angles), dim=-1)[None, :, None, :]
        self.tables = angles.cos(), angles.sin()

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Pixels [N,3,S,S] to features [N,Q,C]."""
        tower, resampler = self.model.visual, self.model.resampler
        x = tower.conv1(pixels).flatten(2).transpose(1, 2)
        x = tower.ln_pre(x + resize_positions(tower.positional_embedding, tower.grid))
        for block in tower.blocks:
            assert isinstance(block, VisionBlock)
            heads = block.attn.heads
            query, key, value = block.attn.in_proj(block.ln_1(x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + block.attn.out_proj(attend(query, key, value, None).transpose(1, 2).flatten(2))
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
        values = resampler.ln_kv(resampler.kv_proj(x))
        keys = values + resize_positions(resampler.pos_embed, resampler.grid)
        queries = (resampler.ln_q(resampler.query) + resampler.pos_embed)[None].expand(len(x), -1, -1)
        attention = resampler.attn
        mixed, _ = F.multi_head_attention_forward(
            query=queries.transpose(0, 1),
            key=keys.transpose(0, 1),
            value=values.transpose(0, 1),
            embed_dim_to_check=keys.shape[-1],
            num_heads=attention.heads,
            in_proj_weight=attention.in_proj_weight,
            in_proj_bias=attention.in_proj_bias,
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=attention.out_proj.weight,
            out_proj_bias=attention.out_proj.bias,
        )
        features: Tensor = resampler.proj(resampler.ln_post(mixed.transpose(0, 1)))
        return features

    def forward(self, input_ids: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """Logits [1,T,V] at every position of ids [1,T], and the cache with T more tokens."""
        config, decoder = self.config, self.model.decoder
        seen = 0 if past is None else past[0][0].shape[1]
        columns = input_ids.shape[1]
        total = seen + columns
        if past is None:
            self.build_tables(total)
        cos, sin = (table[:, seen:total] for table in self.tables)
        lowest = torch.finfo(decoder.wte.weight.dtype).min
        mask = torch.full((columns, total), lowest).triu(seen + 1)[None, None]
        x = decoder.wte(input_ids)
        present: Past = []
        for layer, block in enumerate(decoder.blocks):
            assert isinstance(block, Block)
            mixed = block.attn.c_attn(rms_norm(x, block.ln_1.weight, block.ln_1.eps))
            query, key, value = (t.unflatten(-1, (config.num_attention_heads, -1)) for t in mixed.chunk(3, -1))
            query = (query.float() * cos + rotate_half(query.float()) * sin).type_as(query)
            key = (key.float() * cos + rotate_half(key.float()) * sin).type_as(key)
            if past is not None:
                key, value = torch.cat((past[layer][0], key), 1), torch.cat((past[layer][1], value), 1)
            present.append((key, value))
            query = query * self.logn[:, seen:total].type_as(query).expand_as(query)
            out = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask)
            x = x + block.attn.c_proj(out.transpose(1, 2).flatten(2))
            y = rms_norm(x, block.ln_2.weight, block.ln_2.eps)
            x = x + block.mlp.c_proj(block.mlp.w1(y) * F.silu(block.mlp.w2(y)))
        return decoder.lm_head(rms_norm(x, decoder.ln_f.weight, decoder.ln_f.eps)), present
