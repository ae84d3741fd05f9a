"""The keys and values of the tokens that the decoder has seen, allocated once and owned by the caller.

A row's slots hold its real tokens only, and a token's slot is its position: padding never enters. What lies beyond a
row's length is zero, or left from before a rewind; the mask hides it. Every row has its own length and its own NTK
alpha, so that a row computes what it would compute alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from ..config import QwenVLConfig
from ..errors import CacheError
from .rope import inverse_frequencies, ntk_alpha

# Where new keys go. Without padding and for rows of one length: slots [T]. Else rows, columns and slots that broadcast:
# column t of row b goes to slot s of row b. Columns that are not named, the padding, go nowhere.
Slots: TypeAlias = "Tensor | tuple[Tensor, Tensor, Tensor]"


@dataclass(eq=False)
class KVCache:
    """Keys and values of B rows, with room for S tokens each. Make one with `allocate`.

    Attributes:
        keys, values: [L,B,H,S,D], rotated keys and plain values.
        lengths: [B] int64 on the cache's device, the tokens that each row holds; what a step reads.
        frequencies: [B,D/2] float32 on the device, each row's inverse rotary frequencies under its alpha.
        host_lengths: [B] int64 on the CPU, the same lengths where Python can read them without waiting for the device.
        alphas: [B] float64 on the CPU, each row's NTK alpha; 0 where it is not fixed yet.
    """

    config: QwenVLConfig
    keys: Tensor
    values: Tensor
    lengths: Tensor
    frequencies: Tensor
    host_lengths: Tensor
    alphas: Tensor

    @classmethod
    def allocate(
        cls,
        config: QwenVLConfig,
        batch: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """An empty cache of `batch` rows with `max_length` slots each.

        It takes 2 x layers x batch x max_length x hidden_size elements. Zeros rather than uninitialised memory: a slot
        that the mask hides still enters 0 x value, and 0 x NaN is NaN. Ordinary tensors even in inference mode, so that
        a cache made there can be written to elsewhere. Raises CacheError without a row or a slot.
        """
        if batch < 1 or max_length < 1:
            raise CacheError(f"a cache needs at least one row and one slot, not {batch} x {max_length}")
        heads, head_size = config.num_attention_heads, config.kv_channels
        shape = (config.num_hidden_layers, batch, heads, max_length, head_size)
        with torch.inference_mode(False):
            return cls(
                config,
                keys=torch.zeros(shape, dtype=dtype, device=device),
                values=torch.zeros(shape, dtype=dtype, device=device),
                lengths=torch.zeros(batch, dtype=torch.int64, device=device),
                frequencies=torch.zeros(batch, head_size // 2, device=device),
                host_lengths=torch.zeros(batch, dtype=torch.int64, device="cpu"),
                alphas=torch.zeros(batch, dtype=torch.float64, device="cpu"),
            )

    @property
    def batch(self) -> int:
        """Rows."""
        return self.keys.shape[1]

    @property
    def max_length(self) -> int:
        """Slots of each row."""
        return self.keys.shape[3]

    @property
    def is_empty(self) -> bool:
        """True while no row holds a token."""
        return not self.host_lengths.any()

    def rows(self, selection: slice) -> KVCache:
        """Some of the rows, sharing this cache's memory: what is written through the view is written here."""
        keys, values = self.keys[:, selection], self.values[:, selection]
        return KVCache(self.config, keys, values, *(state[selection] for state in self._states))

    def bucket(self, slots: int) -> KVCache:
        """All rows with their first `slots` slots only, sharing this cache's memory."""
        return replace(self, keys=self.keys[:, :, :, :slots], values=self.values[:, :, :, :slots])

    def declare(self, prompt_lengths: Sequence[int], *, dynamic_ntk: bool = True) -> None:
        """Fix the NTK alpha of every row that has none yet, from the full length of its prompt in tokens.

        A prompt that is prefilled in chunks must be declared before its first chunk, since the reference chooses alpha
        from the whole prompt. A forward on an undeclared row declares the length that it is given. Raises CacheError if
        the number of lengths is not the number of rows.
        """
        if len(prompt_lengths) != self.batch:
            raise CacheError(f"{len(prompt_lengths)} prompt lengths were declared for a cache of {self.batch} rows")
        for row in (self.alphas == 0).nonzero()[:, 0].tolist():
            if prompt_lengths[row] > 0:  # else nothing but padding: its prompt is still to come
                self.alphas[row] = alpha = self._alpha_for(prompt_lengths[row]) if dynamic_ntk else 1.0
                size, base = self.config.kv_channels, self.config.rotary_emb_base
                self.frequencies[row] = inverse_frequencies(size, base, alpha, self.frequencies.device)

    def fits(self, row: int, prompt_length: int) -> bool:
        """Whether a prompt of this many tokens would get the alpha that the row was filled under."""
        return bool(self.alphas[row] == self._alpha_for(prompt_length))

    def rewind(self, lengths: Sequence[int], *, prompt_lengths: Sequence[int] | None = None) -> None:
        """Keep only the first `lengths[b]` tokens of each row b. A row rewound to 0 forgets its alpha.

        The kept keys stay rotated under the row's alpha, so what follows equals an uncached
        `forward(..., ntk_alpha=alpha)`. Where a prompt of the new length (`prompt_lengths` if given, else `lengths`)
        would get another alpha, a warning says so: to get what a fresh prompt gets, rewind to 0 and prefill anew.
        Raises CacheError if a row is shorter than the length asked for.
        """
        prompt_lengths = lengths if prompt_lengths is None else prompt_lengths
        for given in (lengths, prompt_lengths):
            if len(given) != self.batch:
                raise CacheError(f"{len(given)} lengths were given to rewind a cache of {self.batch} rows")
        for row, (length, held) in enumerate(zip(lengths, self.host_lengths.tolist(), strict=True)):
            if not 0 <= length <= held:
                raise CacheError(f"row {row} holds {held} tokens and cannot be rewound to {length}")
        for row, (length, prompt_length) in enumerate(zip(lengths, prompt_lengths, strict=True)):
            if length == 0:
                self.alphas[row] = 0
            elif self.alphas[row] and not self.fits(row, prompt_length):
                warnings.warn(
                    f"row {row} keeps NTK alpha {self.alphas[row]:g} after a rewind to {length} tokens, but a prompt "
                    f"of {prompt_length} has alpha {self._alpha_for(prompt_length):g}; rewind to 0 to prefill anew",
                    stacklevel=2,
                )
        self.host_lengths.copy_(torch.tensor(lengths, device="cpu"))
        self.lengths.copy_(self.host_lengths)

    def reorder(self, rows: Sequence[int], places: Sequence[int] | None = None) -> KVCache:
        """Row b, or row `places[b]`, becomes what row `rows[b]` was, in place.

        So beam search keeps, spreads and drops its hypotheses, and two rows change places. Returns a view of the first
        len(rows) rows.
        """
        old, new = list(rows), list(range(len(rows)) if places is None else places)
        longest = int(self.host_lengths[old].max())
        source, target = torch.tensor([old, new], device=self.keys.device)
        for held in (layer[:, :, :longest] for layer in (*self.keys, *self.values)):  # one by one: one is held twice
            held.index_copy_(0, target.to(held.device), held.index_select(0, source.to(held.device)))
        for state in self._states:
            state[new] = state[old]
        return self.rows(slice(len(rows)))

    def copy_from(self, source: KVCache, length: int) -> None:
        """Hold the first `length` tokens of `source`, a cache or a view of as many rows, under its rows' alphas."""
        for new, old in ((self.keys, source.keys), (self.values, source.values)):
            new[:, :, :, :length] = old[:, :, :, :length]
        for state, old in zip(self._states, source._states, strict=True):
            state.copy_(old)
        self.lengths.fill_(length)
        self.host_lengths.fill_(length)

    def erase(self) -> None:
        """Be empty, and zero: what a failed computation left (NaN) would not be hidden by a mask."""
        for layer in (*self.keys, *self.values):
            layer.zero_()
        self.rewind([0] * self.batch)

    def append(self, layer: int, keys: Tensor, values: Tensor, slots: Slots, bucket: int) -> tuple[Tensor, Tensor]:
        """Write keys and values [B,H,T,D] of one layer; return views of its first `bucket` slots, [B,H,bucket,D].

        Lengths do not change until `advance`.
        """
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            new = new.to(store.dtype)  # under autocast they differ
            if isinstance(slots, Tensor):
                store.index_copy_(2, slots, new)
            else:
                rows, columns, places = slots
                store.transpose(1, 2)[rows, places] = new.transpose(1, 2)[rows, columns]
        return self.keys[layer][:, :, :bucket], self.values[layer][:, :, :bucket]

    def advance(self, new_tokens: Sequence[int]) -> None:
        """Count `new_tokens[b]` more tokens in each row b, after all layers have appended theirs."""
        self.host_lengths += torch.tensor(new_tokens, device="cpu")
        if len(set(new_tokens)) == 1:
            self.lengths += new_tokens[0]
        else:
            self.lengths.copy_(self.host_lengths)

    @property
    def _states(self) -> tuple[Tensor, ...]:
        return self.lengths, self.frequencies, self.host_lengths, self.alphas

    def _alpha_for(self, prompt_length: int) -> float:
        return ntk_alpha(prompt_length, self.config.seq_length) if self.config.use_dynamic_ntk else 1.0
