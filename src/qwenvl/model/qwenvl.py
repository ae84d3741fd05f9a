"""Qwen-VL: pixels and ids in, logits out.

pixels [N,3,S,S]  --visual-->  [N,P,W]  --resampler-->  features [N,Q,C]
input_ids [B,T]   --wte-->     [B,T,C], where each <img> Q ids </img> span receives one image's features
  decoder                      [B,T,C]
  lm_head                      logits [B,T,V]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import QwenVLConfig
from ..errors import PromptError
from .cache import KVCache
from .decoder import Decoder
from .resampler import Resampler
from .vision import VisionTower


@dataclass(frozen=True)
class Output:
    """What `forward` returns when more than logits is asked for; columns are those of the input.

    Attributes:
        logits: [B,T,V].
        hidden_states: L + 1 tensors [B,T,C]: the residual stream before each block, then the final norm's output.
        attentions: L tensors [B,H,T,S] float32, rows sum to one; S is the input's columns, or the cache's slots.
    """

    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class QwenVL(nn.Module):
    """The whole model of arXiv 2308.12966. Stateless between calls: what lasts is in the caller's `KVCache`.

    A new one has the initial weights of training from scratch; `qwenvl.load` fills one with a checkpoint's.
    """

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.visual)
        self.resampler = Resampler(config.visual)
        self.decoder = Decoder(config)
        if not self.decoder.wte.weight.is_meta:
            self.initialize()

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Visual tokens [N,Q,C] of pixels [N,3,S,S] (from `qwenvl.preprocess`; moved to the model's device and dtype).

        Raises PromptError if the pixels have another shape.
        """
        self.check_pixels(pixels)
        return self.resampler(self.visual(pixels.to(self.visual.conv1.weight)))

    def embed(
        self,
        input_ids: Tensor,
        pixels: Tensor | None = None,
        image_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Embeddings [B,T,C] of a prompt's ids [B,T], every `<img>` span filled with its image's features.

        Images are given as pixels [N,3,S,S] or as features [N,Q,C], in reading order, row by row. Raises PromptError if
        spans and images do not match, or a span has not exactly Q ids between its tags.
        """
        input_ids = input_ids.to(self.decoder.wte.weight.device)
        x = self._look_up(input_ids, checked=True)
        return self._fill_spans(x, input_ids, pixels, image_features, _real_columns(attention_mask, x))

    def forward(
        self,
        input_ids: Tensor | None,
        pixels: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        image_features: Tensor | None = None,
        embeddings: Tensor | None = None,
        logits_to_keep: int | None = None,
        return_hidden: bool = False,
        return_attentions: bool = False,
        ntk_alpha: float | Sequence[float] | Tensor | None = None,
    ) -> Tensor | Output:
        """Logits [B,T,V] of ids [B,T]; an `Output` when hidden states or attention maps are asked for.

        Args:
            input_ids: [B,T]. May be None if `embeddings` are given.
            pixels: [N,3,S,S], the images of all rows in reading order.
            attention_mask: [B,T], true or 1 at real tokens; None means that all are. Padding may stand on any side.
            cache: receives the keys and values of the real tokens, and provides those of earlier calls.
            image_features: [N,Q,C] from `encode_images`, in place of pixels.
            embeddings: [B,T,C] in place of the token table's rows.
            logits_to_keep: return the last so many columns of logits only, and save the head's work on the others.
            return_hidden: also return the residual stream.
            return_attentions: also return attention maps, computed without the fused kernel.
            ntk_alpha: replaces the dynamic-NTK alpha of the rows' lengths, one number or one a row. Not with a cache,
                whose rows have their own.

        Every row computes what it would compute alone: its NTK alpha and log-n factors come from its own real tokens.
        (The reference takes the padded length, so it differs for padded rows of more than `seq_length` tokens.)
        Neither applies in training mode. `<img>` starts an image span in a prompt only: with images given, or while the
        cache is empty or absent. In a later step every tag is an ordinary id.
        Raises PromptError for shapes, spans or lengths that do not fit, CacheError for a cache that does not.
        """
        device = self.decoder.wte.weight.device
        input_ids = None if input_ids is None else input_ids.to(device)
        if embeddings is None:
            if input_ids is None:
                raise PromptError("forward needs input_ids or embeddings")
            may_have_spans = cache is None or cache.is_empty
            x = self._look_up(input_ids, checked=may_have_spans)
        else:
            x, may_have_spans = embeddings.to(self.decoder.wte.weight), False
            if x.dim() != 3 or x.shape[2] != self.config.hidden_size or x.numel() == 0:
                width = self.config.hidden_size
                raise PromptError(f"embeddings must be [B,T,{width}] with at least one token, not {list(x.shape)}")
            if input_ids is not None and input_ids.shape != x.shape[:2]:
                raise PromptError(f"embeddings are {list(x.shape)} but input_ids are {list(input_ids.shape)}")
        real = _real_columns(attention_mask, x)
        if may_have_spans or pixels is not None or image_features is not None:
            x = self._fill_spans(x, input_ids, pixels, image_features, real)
        batch, columns = x.shape[:2]
        if logits_to_keep is not None and logits_to_keep < 0:
            raise PromptError(f"logits_to_keep must be from 0 up, not {logits_to_keep}")
        alphas = None if ntk_alpha is None else self._alphas(ntk_alpha, batch, cache)
        order, row_lengths = (None, [columns] * batch) if real is None else _left_alignment(real)
        if order is not None:
            x = _take_columns(x, order)
        hidden: list[Tensor] | None = [] if return_hidden else None
        maps: list[Tensor] | None = [] if return_attentions else None
        x = self.decoder(x, row_lengths, cache=cache, alphas=alphas, hidden_states=hidden, maps=maps)
        if order is not None:  # back to the caller's columns
            back = order.argsort(dim=1)
            x = _take_columns(x, back)
            hidden = hidden and [_take_columns(h, back) for h in hidden]
            maps = maps and [_restore_map(m, back.to(m.device), keys_too=cache is None) for m in maps]
        logits = self.decoder.lm_head(x if logits_to_keep is None else x[:, max(columns - logits_to_keep, 0) :])
        if hidden is None and maps is None:
            return logits
        return Output(logits, None if hidden is None else tuple(hidden), None if maps is None else tuple(maps))

    def _look_up(self, input_ids: Tensor, *, checked: bool) -> Tensor:
        """Embeddings of ids [B,T]. Steps leave their ids unchecked: to look at them would wait for the device."""
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise PromptError(f"input_ids must be [B,T] with at least one token, not {list(input_ids.shape)}")
        if checked and not ((input_ids >= 0) & (input_ids < self.config.vocab_size)).all():
            raise PromptError(f"input_ids must be from 0 to {self.config.vocab_size - 1}, the model's vocabulary")
        return self.decoder.wte(input_ids)

    def _fill_spans(
        self,
        embeddings: Tensor,
        input_ids: Tensor | None,
        pixels: Tensor | None,
        image_features: Tensor | None,
        real: Tensor | None,
    ) -> Tensor:
        """`embeddings` [B,T,C] with the features of the n-th image in the n-th `<img>` span."""
        if pixels is not None and image_features is not None:
            raise PromptError("give pixels or image_features, not both")
        if pixels is not None:
            self.check_pixels(pixels)
        spans = [] if input_ids is None else self.find_spans(input_ids, real)
        images = pixels if image_features is None else image_features
        if len(spans) != (0 if images is None else len(images)):
            count = 0 if images is None else len(images)
            raise PromptError(f"the prompt has {len(spans)} image spans but {count} images were given")
        if images is None or not spans:
            return embeddings
        features = (self.encode_images(images) if image_features is None else images).to(embeddings)
        n_queries, width = self.config.visual.n_queries, self.config.hidden_size
        if features.shape[1:] != (n_queries, width):
            raise PromptError(f"image_features must be [N,{n_queries},{width}], not {list(features.shape)}")
        start = torch.tensor(spans, device=embeddings.device)  # [N,2]: row, first column inside the span
        columns = start[:, 1:] + torch.arange(n_queries, device=embeddings.device)  # [N,Q]
        return embeddings.index_put((start[:, :1], columns), features)

    def check_pixels(self, pixels: Tensor) -> None:
        """Raise PromptError unless they are [N,3,S,S]."""
        size = self.config.visual.image_size
        if pixels.dim() != 4 or pixels.shape[1:] != (3, size, size):
            raise PromptError(f"pixels must be [N,3,{size},{size}], not {list(pixels.shape)}")

    def find_spans(self, input_ids: Tensor, real: Tensor | None) -> list[tuple[int, int]]:
        """Row and first inner column of every image span, in reading order. Ids inside a span do not matter."""
        config = self.config.visual
        starts = input_ids == config.image_start_id
        if real is not None:
            starts &= real
        spans: list[tuple[int, int]] = []
        inside_until = (-1, -1)
        for row, column in starts.nonzero().tolist():
            if (row, column) <= inside_until:
                continue
            end = column + 1 + config.n_queries
            if end >= input_ids.shape[1] or input_ids[row, end] != config.image_end_id:
                ends = (input_ids[row, column:] == config.image_end_id).nonzero()
                width = f"{int(ends[0]) - 1} ids wide" if len(ends) else "not closed"
                raise PromptError(
                    f"the image span at row {row}, column {column} is {width}; between <img> ({config.image_start_id}) "
                    f"and </img> ({config.image_end_id}) there must be {config.n_queries} ids"
                )
            spans.append((row, column + 1))
            inside_until = (row, end)
        return spans

    def _alphas(self, ntk_alpha: float | Sequence[float] | Tensor, batch: int, cache: KVCache | None) -> list[float]:
        if cache is not None:
            raise PromptError("ntk_alpha cannot be given with a cache: its rows keep the alpha of their prompts")
        given = ntk_alpha.tolist() if isinstance(ntk_alpha, Tensor) else ntk_alpha
        alphas = [float(given)] * batch if isinstance(given, (int, float)) else [float(a) for a in given]
        if len(alphas) != batch or not all(math.isfinite(a) and a >= 1 for a in alphas):
            raise PromptError(f"ntk_alpha must be one number from 1 up, or one for each of {batch} rows, not {alphas}")
        return alphas

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the weights that training from scratch begins with, from torch's default generator.

        Normal with `initializer_range`, the decoder's output projections divided by sqrt(2 L), biases zero, norms one.
        """
        spread = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif ".ln_" in name:
                parameter.fill_(1.0)
            elif name.startswith("decoder.") and name.endswith("c_proj.weight"):
                parameter.normal_(std=spread / math.sqrt(2 * self.config.num_hidden_layers))
            else:
                parameter.normal_(std=spread)
        self.resampler.initialize_positions()


def _real_columns(attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask [B,T] of an input x [B,T,C] as booleans on its device."""
    if attention_mask is None:
        return None
    if attention_mask.shape != x.shape[:2]:
        raise PromptError(f"attention_mask is {list(attention_mask.shape)} but the input is {list(x.shape[:2])}")
    return attention_mask.to(x.device).bool()


def _left_alignment(real: Tensor) -> tuple[Tensor | None, list[int]]:
    """The order [B,T] that moves each row's real columns to its left, None if all are real; real tokens per row."""
    row_lengths = real.sum(dim=1).tolist()
    if min(row_lengths) == real.shape[1]:
        return None, row_lengths
    return (~real).to(torch.uint8).argsort(dim=1, stable=True), row_lengths


def _take_columns(x: Tensor, order: Tensor) -> Tensor:
    """Columns of x [B,T,C], row by row in the order [B,T]."""
    return x.gather(1, order.to(x.device)[:, :, None].expand(-1, -1, x.shape[-1]))


def _restore_map(weights: Tensor, back: Tensor, *, keys_too: bool) -> Tensor:
    """An attention map [B,H,T,S] back in the caller's columns; keys too, unless they are a cache's slots."""
    batch, heads, queries, keys = weights.shape
    weights = weights.gather(2, back[:, None, :, None].expand(batch, heads, queries, keys))
    return weights.gather(3, back[:, None, None, :].expand(batch, heads, queries, keys)) if keys_too else weights
