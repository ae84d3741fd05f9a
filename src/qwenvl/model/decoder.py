"""The language decoder: embeddings in, hidden states out (Qwen-7B: RMSNorm, rotary attention, SwiGLU).

Rows are left-aligned here: row b's real tokens are its first `row_lengths[b]` columns, whatever follows them is
padding that a causal mask already hides. `qwenvl.py` aligns them on the way in and puts them back on the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import QwenVLConfig
from ..errors import CacheError, PromptError
from .cache import KVCache, Slots
from .rope import inverse_frequencies, logn_factors, ntk_alpha, rotary_tables, rotate


@dataclass(frozen=True)
class AttentionContext:
    """What all layers of one forward share."""

    cos: Tensor  # [B,1,T,1,D] float32
    sin: Tensor
    logn: Tensor | None  # [B,T,1,1] in the activations' dtype
    mask: Tensor | None  # [1 or B,1,T,bucket] bool, true where a query may look; in a `step`, 0 there and else -inf
    causal: bool  # query t looks at keys 0..t, and no mask is needed to say so
    cache: KVCache | None
    slots: Slots | None  # where this forward's keys go
    bucket: int  # how many of the cache's slots attention reads

    def visible(self, queries: int, keys: int) -> Tensor:
        """The mask that is meant, [1 or B,1,T,bucket], also where `causal` or nothing at all stands for it."""
        if self.mask is not None:
            return self.mask
        everything = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=self.cos.device)
        return everything.tril() if self.causal else everything


class RMSNorm(nn.Module):
    """Root-mean-square norm: in float32 (torch sees to it), cast back, then multiplied, in the reference's order."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[...,C] to [...,C]."""
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


class Attention(nn.Module):
    """Causal self-attention with rotary positions and log-n scaled queries."""

    def __init__(self, *, width: int, heads: int, head_size: int) -> None:
        super().__init__()
        self.attend: Callable[..., Tensor] = F.scaled_dot_product_attention
        self.heads, self.head_size = heads, head_size
        self.c_attn = nn.Linear(width, 3 * heads * head_size)
        self.c_proj = nn.Linear(heads * head_size, width, bias=False)

    def queries_keys_values(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
        """[B,T,C] to rotated, log-n scaled queries, rotated keys, and values, each [B,H,T,D].

        By itself, so that it can be watched from outside.
        """
        qkv = self.c_attn(x).unflatten(-1, (3, self.heads, self.head_size)).transpose(1, 2)  # [B,3,T,H,D]
        both, value = qkv.split((2, 1), dim=1)  # not slices: the gradient of each would be as large as the whole
        query, key = rotate(both, context.cos, context.sin).unbind(1)
        if context.logn is not None:
            query = query * context.logn
        return query.transpose(1, 2), key.transpose(1, 2), value.squeeze(1).transpose(1, 2)

    def forward(self, x: Tensor, context: AttentionContext, layer: int, maps: list[Tensor] | None) -> Tensor:
        """[B,T,C] to [B,T,C]; the attention map [B,H,T,S] is appended to `maps` if there is such a list."""
        query, key, value = self.queries_keys_values(x, context)
        if context.cache is not None and context.slots is not None:
            key, value = context.cache.append(layer, key, value, context.slots, context.bucket)
        if maps is None:
            # The fused kernels keep the softmax in float32; the reference runs it in the activations' dtype.
            mixed = self.attend(query, key, value, context.mask, is_causal=context.causal)
        else:
            scores = query @ key.transpose(-1, -2) * self.head_size**-0.5
            scores = scores.float().masked_fill(~context.visible(*scores.shape[-2:]), -torch.inf)
            maps.append(scores.softmax(dim=-1))
            mixed = maps[-1].type_as(value) @ value
        return self.c_proj(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """`c_proj(w1(x) * silu(w2(x)))`: in the reference's names it is `w2` that gates."""

    def __init__(self, *, width: int, inner_width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner_width, bias=False)
        self.w2 = nn.Linear(width, inner_width, bias=False)
        self.c_proj = nn.Linear(inner_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,C] to [B,T,C]."""
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_epsilon
        self.ln_1 = RMSNorm(width, eps=eps)
        self.attn = Attention(width=width, heads=config.num_attention_heads, head_size=config.kv_channels)
        self.ln_2 = RMSNorm(width, eps=eps)
        self.mlp = SwiGLU(width=width, inner_width=config.mlp_width)

    def forward(self, x: Tensor, context: AttentionContext, layer: int, maps: list[Tensor] | None = None) -> Tensor:
        """[B,T,C] to [B,T,C]."""
        x = x + self.attn(self.ln_1(x), context, layer, maps)
        return x + self.mlp(self.ln_2(x))


class Decoder(nn.Module):
    """Token table, blocks, final norm and head."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        self.config = config
        # From an empty table, since drawing random numbers on the meta device, only to load others, takes seconds.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.wte: nn.Embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        embeddings: Tensor,
        row_lengths: Sequence[int],
        *,
        cache: KVCache | None = None,
        alphas: Sequence[float] | None = None,
        hidden_states: list[Tensor] | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        """Left-aligned embeddings [B,T,C] to the final hidden states [B,T,C], before the head.

        row_lengths: real tokens of each row among the T. alphas: NTK alphas that replace those of the rows' lengths.
        The residual stream before each block and the final hidden states are appended to `hidden_states`, the
        attention maps [B,H,T,S] to `maps`, if there are such lists.
        Raises PromptError beyond the model's positions, CacheError if the cache does not fit.
        """
        context = self._context(embeddings, row_lengths, cache, alphas)
        x = embeddings
        for layer, block in enumerate(self.blocks):
            if hidden_states is not None:
                hidden_states.append(x)
            x = block(x, context, layer, maps)
        x = self.ln_f(x)
        if hidden_states is not None:
            hidden_states.append(x)
        if cache is not None:
            cache.advance(row_lengths)
        return x

    def step(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Logits [B,V] behind one more id [B] in each row, as `forward` has them, from tensors alone.

        Nothing here waits for the device or depends on a number that the host knows, so it can be captured once and
        replayed. Every slot of the cache is read and those beyond a row masked, so give it a `bucket`. Only `lengths`
        advance; `host_lengths` are the caller's. A row that is full writes over its last slot.
        """
        bucket = cache.max_length
        positions = cache.lengths.clamp(max=bucket - 1)[:, None]  # [B,1]
        rows = torch.arange(cache.batch, device=ids.device)[:, None]
        slots: Slots = positions[0] if cache.batch == 1 else (rows, torch.zeros_like(rows), positions)
        x = self.wte(ids[:, None])
        # Not bool: every layer's attention would make this of it anew.
        hidden = torch.arange(bucket, device=ids.device) > positions[:, None, :, None]
        mask = torch.zeros_like(hidden, dtype=x.dtype).masked_fill(hidden, -torch.inf)
        turns = self._turns(positions, cache.frequencies, bucket, x.dtype)
        context = AttentionContext(*turns, mask, False, cache, slots, bucket)
        for layer, block in enumerate(self.blocks):
            x = block(x, context, layer)
        cache.lengths += 1
        logits: Tensor = self.lm_head(self.ln_f(x)[:, 0])
        return logits

    def _context(
        self, embeddings: Tensor, row_lengths: Sequence[int], cache: KVCache | None, alphas: Sequence[float] | None
    ) -> AttentionContext:
        (batch, columns), device = embeddings.shape[:2], embeddings.device
        config, stretch = self.config, self.config.use_dynamic_ntk and not self.training
        starts = [0] * batch if cache is None else cache.host_lengths.tolist()
        self._check_lengths(batch, row_lengths, cache, starts)
        positions = torch.arange(columns, device=device)[None]  # [1,T], or [B,T] once a cache says where rows begin
        slots: Slots | None = None
        mask = None
        bucket = columns
        if cache is None:
            if alphas is None:
                alphas = [ntk_alpha(n, config.seq_length) if stretch else 1.0 for n in row_lengths]
            frequencies = self._frequencies(alphas, device)
        else:
            cache.declare(row_lengths, dynamic_ntk=stretch)
            positions = cache.lengths[:, None] + positions
            frequencies = cache.frequencies
            bucket = min(max(starts) + columns, cache.max_length)
            slots, mask = _placement(positions, starts, row_lengths, bucket)
        causal = mask is None and columns > 1
        turns = self._turns(positions, frequencies, bucket, embeddings.dtype)
        return AttentionContext(*turns, mask, causal, cache, slots, bucket)

    def _turns(
        self, positions: Tensor, frequencies: Tensor, bucket: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cosines and sines of positions [B,T], and log-n factors where the bucket goes beyond the trained length."""
        config, logn = self.config, None
        if config.use_logn_attn and not self.training and bucket > config.seq_length:
            logn = logn_factors(positions, config.seq_length)[:, :, None, None].to(dtype)
        return *rotary_tables(positions, frequencies), logn

    def _frequencies(self, alphas: Sequence[float], device: torch.device) -> Tensor:
        """[B,D/2], or [1,D/2] where all rows share one alpha."""
        config = self.config
        rows = alphas[:1] if len(set(alphas)) == 1 else alphas
        return torch.stack([inverse_frequencies(config.kv_channels, config.rotary_emb_base, a, device) for a in rows])

    def _check_lengths(self, batch: int, row_lengths: Sequence[int], cache: KVCache | None, starts: list[int]) -> None:
        longest = max(start + new for start, new in zip(starts, row_lengths, strict=False))
        if longest > self.config.max_position_embeddings:
            raise PromptError(
                f"{longest} tokens are more than the model's {self.config.max_position_embeddings} positions "
                "(max_position_embeddings); shorten the prompt or the history"
            )
        if cache is None:
            return
        if cache.batch != batch:
            raise CacheError(f"the cache has {cache.batch} rows but the input has {batch}")
        weight, config = self.wte.weight, self.config
        if (cache.keys.dtype, cache.keys.device) != (weight.dtype, weight.device):
            raise CacheError(
                f"the cache is {cache.keys.dtype} on {cache.keys.device}, the model {weight.dtype} on {weight.device}"
            )
        made_for = (cache.keys.shape[0], cache.keys.shape[2], cache.keys.shape[4])
        if made_for != (config.num_hidden_layers, config.num_attention_heads, config.kv_channels):
            raise CacheError(
                f"the cache is for another model: {made_for} layers, heads, head size; allocate one for this"
            )
        if longest > cache.max_length:
            raise CacheError(f"{longest} tokens do not fit into the cache's {cache.max_length} slots; allocate more")


def _placement(
    positions: Tensor, starts: list[int], row_lengths: Sequence[int], bucket: int
) -> tuple[Slots, Tensor | None]:
    """Where new keys at `positions` [B,T] go, and the mask [1 or B,1,T,bucket] of what their queries may see.

    No mask for the first tokens of all rows, where attention is causal, nor for one new token each in rows of one
    length, which sees everything.
    """
    (batch, columns), device = positions.shape, positions.device
    same_start = len(set(starts)) == 1
    slots: Slots
    if min(row_lengths) < columns:
        real = torch.arange(columns, device="cpu") < torch.tensor(row_lengths, device="cpu")[:, None]
        rows, real_columns = (index.to(device) for index in real.nonzero(as_tuple=True))
        slots = rows, real_columns, positions[rows, real_columns]
    elif same_start:
        slots = positions[0]
    else:
        slots = torch.arange(batch, device=device)[:, None], torch.arange(columns, device=device)[None], positions
    if (bucket == columns and max(starts) == 0) or (same_start and columns == 1):
        return slots, None
    looking = positions[:1] if same_start else positions
    return slots, torch.arange(bucket, device=device) <= looking[:, None, :, None]
