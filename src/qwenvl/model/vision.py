"""The vision tower: pixels to patch features (paper section 2.1; a ViT-bigG without class token and final norm).

pixels [N,3,S,S]
  conv1, stride = patch                [N,W,g,g]  ->  [N,P,W], P = g x g, row by row
  + positional_embedding, resized      [P,W]
  ln_pre, blocks                       [N,P,W]
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import REFERENCE_GRID, VisionConfig

LAYER_NORM_EPSILON = 1e-6  # throughout vision; config.json's `layer_norm_epsilon` is the decoder's


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """Absolute 2D positions [n,W] of a square grid, resized bicubically as a picture to `grid` x `grid`: [grid*grid,W].

    In float32 and cast back, as in the reference.
    """
    side = math.isqrt(table.shape[0])
    if side == grid:
        return table
    picture = table.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(picture, size=(grid, grid), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(0, 2).type_as(table)


class VisionAttention(nn.Module):
    """Self-attention over the patches of each image, without a mask."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N,P,W] to [N,P,W]. Scores are scaled by 1/sqrt(head size)."""
        query, key, value = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [N,H,P,D]
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """Two linears around an exact (erf) GELU."""

    def __init__(self, *, width: int, inner_width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, inner_width)
        self.c_proj = nn.Linear(inner_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N,P,W] to [N,P,W]."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, *, width: int, heads: int, inner_width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)
        self.attn = VisionAttention(width=width, heads=heads)
        self.ln_2 = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)
        self.mlp = VisionMLP(width=width, inner_width=inner_width)

    def forward(self, x: Tensor) -> Tensor:
        """[N,P,W] to [N,P,W]."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionTower(nn.Module):
    """Patches, interpolated 2D absolute positions, transformer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.grid = config.grid
        patch, width = config.patch_size, config.width
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(REFERENCE_GRID**2, width))
        self.ln_pre = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)
        self.blocks = nn.ModuleList(
            VisionBlock(width=width, heads=config.heads, inner_width=config.mlp_width) for _ in range(config.layers)
        )

    def embed_patches(self, pixels: Tensor) -> Tensor:
        """Pixels [N,3,S,S] to normalised patch embeddings with their positions, [N,P,W]."""
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)  # [N,P,W]
        return self.ln_pre(patches + resize_positions(self.positional_embedding, self.grid))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [N,3,S,S], normalised by `qwenvl.preprocess`, to patch features [N,P,W]."""
        x = self.embed_patches(pixels)
        for block in self.blocks:
            x = block(x)
        return x
