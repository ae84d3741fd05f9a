"""The resampler: patch features to a fixed number of visual tokens by one cross-attention (paper section 2.1).

patches [N,P,W]  --kv_proj, ln_kv-->  [N,P,C]   keys = this + positions of the patch grid; values = this
query [Q,C]      --ln_q----------->   [Q,C]     queries = this + positions of the query grid
  attention                           [N,Q,C]
  ln_post, proj                       [N,Q,C]
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import VisionConfig
from .vision import LAYER_NORM_EPSILON, resize_positions


def sincos_positions(side: int, width: int) -> Tensor:
    """The fixed 2D sine-cosine table of a `side` x `side` grid, row by row: [side*side,width] float32.

    The first half of the channels encodes the column, the second the row; each half is [sin, cos] of position x omega,
    omega_i = 10000^(-i / (width/4)). Computed in float64.
    """
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width / 4))
    angles = torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * omega
    line = torch.cat((angles.sin(), angles.cos()), dim=1)  # [side, width/2], one coordinate
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, dim=0)
    return torch.cat((columns, rows), dim=1).float()


class CrossAttention(nn.Module):
    """Multi-head attention whose queries, keys and values come from three places.

    One weight holds the three input projections, q;k;v over the whole width, as in `torch.nn.MultiheadAttention`.
    """

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """From query [Q,C], shared by all images, and key and value [N,P,C] to [N,Q,C]."""
        projected = [
            F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(-2, -3)  # [..., H, tokens, D]
            for x, weight, bias in zip(
                (query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True
            )
        ]
        q, k, v = projected
        mixed = F.scaled_dot_product_attention(q.expand(k.shape[0], -1, -1, -1), k, v)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """Learned queries that read the patches: P patches of width W become Q visual tokens of the decoder's width C."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.grid = config.grid
        width = config.output_dim
        self.query = nn.Parameter(torch.empty(config.n_queries, width))
        # A constant table, but a tensor of the checkpoint: it is loaded like a weight and never trained.
        self.pos_embed = nn.Parameter(torch.empty(config.n_queries, width), requires_grad=False)
        same_width = config.width == width
        self.kv_proj = nn.Identity() if same_width else nn.Linear(config.width, width, bias=False)
        self.ln_q = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)
        self.ln_kv = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)
        self.attn = CrossAttention(width=width, heads=config.resampler_heads)
        self.ln_post = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)
        self.proj = nn.Linear(width, width, bias=False)

    def initialize_positions(self) -> None:
        """Fill `pos_embed` with the sine-cosine table."""
        with torch.no_grad():
            side = math.isqrt(self.pos_embed.shape[0])
            self.pos_embed.copy_(sincos_positions(side, self.pos_embed.shape[1]))

    def attend(self, patches: Tensor) -> Tensor:
        """Patch features [N,P,W] to [N,Q,C], before the output projection. Values carry no positions."""
        values = self.ln_kv(self.kv_proj(patches))
        keys = values + resize_positions(self.pos_embed, self.grid)
        return self.attn(self.ln_q(self.query) + self.pos_embed, keys, values)

    def forward(self, patches: Tensor) -> Tensor:
        """Patch features [N,P,W] to visual tokens [N,Q,C], ready to stand among the decoder's embeddings."""
        return self.proj(self.ln_post(self.attend(patches)))
