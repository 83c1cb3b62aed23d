"""PackedStore: kept tokens of one layer in flat buffers, one segment per (row, KV head), never padded to the longest.

    keys      [capacity, D]       segment r occupies starts[r] ... starts[r] + room[r], of which lengths[r] are in use
    values    [capacity, Dv]      the rest is slack that new tokens fill
    positions [capacity] int32    the column of the token in the (padded) input; ascending within a segment

In int8 keys and values are codes, and key_scales and value_scales [capacity] float16 go with them.

Segments are row-major: r = row * n_heads + head. Lengths live on the host, so that no step waits for the device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvpress_kernels.reference.int8 import SCALE_DTYPE, dequantise, quantise
from kvpress_kernels.reference.packed_attention import packed_attention
from kvpress_kernels.reference.packed_decode import packed_decode

#: slack added when a segment is full: at least this many tokens, or 1/16 of the segment
MIN_SLACK = 16


class PackedStore:
    """Ragged K/V storage of one layer; policy-free (it is told what to keep)."""

    def __init__(self, keys: Tensor, values: Tensor, kept: Sequence[Tensor], dtype: torch.dtype | None = None) -> None:
        """Copy the kept tokens of dense tensors, without slack.

        Args:
            keys: [B, H, n, D], values: [B, H, n, Dv].
            kept: for each (row, head), row-major, the ascending columns [m] to store; m may differ.
            dtype: of the stored numbers, None for that of the dense tensors; torch.int8 stores codes and scales.
        """
        self.n_heads, self.dtype = keys.shape[1], keys.dtype
        self.lengths = [int(columns.numel()) for columns in kept]
        self.room = list(self.lengths)
        self._place()
        total = sum(self.lengths)
        int8 = dtype == torch.int8
        self.keys = keys.new_empty(total, keys.shape[-1], dtype=dtype)
        self.values = values.new_empty(total, values.shape[-1], dtype=dtype)
        self.key_scales = keys.new_empty(total, dtype=SCALE_DTYPE) if int8 else None
        self.value_scales = keys.new_empty(total, dtype=SCALE_DTYPE) if int8 else None
        self.positions = torch.cat(list(kept)).to(keys.device, torch.int32)
        for index, columns in enumerate(kept):  # straight into the buffers: no second copy of the kept tokens
            row, head = divmod(index, self.n_heads)
            used = slice(self.starts[index], self.starts[index] + self.lengths[index])
            if dtype is None:
                torch.index_select(keys[row, head], 0, columns, out=self.keys[used])
                torch.index_select(values[row, head], 0, columns, out=self.values[used])
            elif self.key_scales is None or self.value_scales is None:
                self.keys[used], self.values[used] = keys[row, head, columns], values[row, head, columns]
            else:
                self.keys[used], self.key_scales[used] = quantise(keys[row, head, columns])
                self.values[used], self.value_scales[used] = quantise(values[row, head, columns])

    @property
    def n_rows(self) -> int:
        return len(self.lengths) // self.n_heads

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, slack included."""
        return sum(t.untyped_storage().nbytes() for _, t in self._buffers())

    @property
    def token_bytes(self) -> int:
        """Bytes of one stored token in one head, position included."""
        return sum(t.shape[1:].numel() * t.element_size() for _, t in self._buffers())

    def row_bytes(self, row: int) -> int:
        """Bytes of the tokens of one row, slack left out."""
        return sum(self.lengths[row * self.n_heads : (row + 1) * self.n_heads]) * self.token_bytes

    @property
    def index_bytes(self) -> int:
        """Of `nbytes`, what says where tokens are: positions."""
        return self.positions.numel() * self.positions.element_size()

    @property
    def slack_bytes(self) -> int:
        """Of `nbytes`, room that holds no token yet."""
        return (sum(self.room) - sum(self.lengths)) * self.token_bytes

    def decode(self, query: Tensor, **options: Any) -> Tensor:
        """Attention of one token a row: query [B, H, G, D] -> [B, H, G, Dv]; options of `packed_decode`."""
        return packed_decode(query, self.keys, self.values, self.starts, self.lengths, **self._scales, **options)

    def attend(self, query: Tensor, columns: Tensor, **options: Any) -> Tensor:
        """Attention of q tokens a row in columns [q]: query [B, H, G, q, D] -> [B, H, G, q, Dv]."""
        return packed_attention(
            query, self.keys, self.values, self.positions, self.starts, self.lengths, columns, **self._scales, **options
        )

    def segment(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """One segment's keys [n, D], values [n, Dv] and positions [n]: views, or copies in the model's dtype of what is stored in
        another."""
        used = slice(self.starts[index], self.starts[index] + self.lengths[index])
        if self.key_scales is None or self.value_scales is None:
            return self.keys[used].to(self.dtype), self.values[used].to(self.dtype), self.positions[used]
        keys = dequantise(self.keys[used], self.key_scales[used], self.dtype)
        return keys, dequantise(self.values[used], self.value_scales[used], self.dtype), self.positions[used]

    def bases(self, index: int) -> None:
        """None: what a segment shows is of full size."""

    def segments(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All segments, row-major."""
        return (self.segment(index) for index in range(len(self.lengths)))

    def append(self, keys: Tensor, values: Tensor, columns: Tensor, valid: Tensor | None = None) -> None:
        """Add new tokens at the end of every segment.

        Args:
            keys: [B, H, q, D], values: [B, H, q, Dv], columns: [q] their columns in the input.
            valid: [B, q] bool on the host, False for padding, which is not stored; None when there is none.
        """
        n_new = keys.shape[2]
        counts = [n_new] * self.n_rows if valid is None else [int(row.sum()) for row in valid]
        per_segment = [count for count in counts for _ in range(self.n_heads)]
        if any(n + new > room for n, new, room in zip(self.lengths, per_segment, self.room, strict=True)):
            self._grow(per_segment)
        self._make_writable()
        if valid is None and len(set(self.lengths)) == 1 and len(set(self.room)) == 1:
            self._append_evenly(keys, values, columns)
            self.lengths = [n + n_new for n in self.lengths]
            return
        ends = torch.tensor([s + n for s, n in zip(self.starts, self.lengths, strict=True)])
        if valid is None:
            target = (ends[:, None] + torch.arange(n_new)).flatten().to(self.keys.device)
            source_keys, source_values = keys.reshape(-1, keys.shape[-1]), values.reshape(-1, values.shape[-1])
            source_columns = columns.repeat(len(self.lengths))
        else:
            offset = (valid.long().cumsum(1) - 1).repeat_interleave(self.n_heads, 0)  # [R, q]
            chosen = valid.repeat_interleave(self.n_heads, 0)
            target = (ends[:, None] + offset)[chosen].to(self.keys.device)
            mask = chosen.to(keys.device)
            source_keys, source_values = keys.flatten(0, 1)[mask], values.flatten(0, 1)[mask]
            source_columns = columns.expand(len(self.lengths), -1)[mask.to(columns.device)]
        for name, new in self._encoded(source_keys, source_values, source_columns.to(self.positions)):
            getattr(self, name).index_copy_(0, target, new)
        self.lengths = [n + new for n, new in zip(self.lengths, per_segment, strict=True)]

    def _append_evenly(self, keys: Tensor, values: Tensor, columns: Tensor) -> None:
        """`append` where all segments end at the same offset: one strided copy instead of an index (half the time)."""
        first, room, n_new = self.lengths[0], self.room[0], keys.shape[2]
        new = slice(first, first + n_new)
        for name, source in self._encoded(keys.flatten(0, 1), values.flatten(0, 1), columns.to(self.positions)):
            buffer = getattr(self, name)
            buffer.view(-1, room, *buffer.shape[1:])[:, new] = source

    def _make_writable(self) -> None:
        """Buffers from torch.inference_mode cannot be written outside it: continue on copies."""
        if self.keys.is_inference() and not torch.is_inference_mode_enabled():
            for name, buffer in list(self._buffers()):
                setattr(self, name, buffer.clone())

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The flat buffers by their names."""
        for name in ("keys", "values", "positions", "key_scales", "value_scales"):
            buffer = getattr(self, name)
            if buffer is not None:
                yield name, buffer

    @property
    def _scales(self) -> dict[str, Any]:
        return {name: buffer for name, buffer in self._buffers() if name.endswith("_scales")}

    def _encoded(self, keys: Tensor, values: Tensor, positions: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What goes into each buffer for new keys [..., D], values and positions."""
        yield "positions", positions
        if self.key_scales is None:
            yield from (("keys", keys.to(self.keys.dtype)), ("values", values.to(self.values.dtype)))
            return
        for name, vectors in (("key", keys), ("value", values)):
            codes, scales = quantise(vectors)
            yield from ((f"{name}s", codes), (f"{name}_scales", scales))

    def keep(self, kept: Sequence[Tensor]) -> None:
        """Reduce every segment to the tokens that `kept` [n] (ascending indices) names, and free the rest."""
        self._replace(kept, [int(index.numel()) for index in kept])

    def truncate(self, column: int) -> None:
        """Forget tokens at or behind a column of the input (a rejected draft); their room becomes slack."""
        self.lengths = self.stored_before(column)

    def stored_before(self, column: int) -> list[int]:
        """Tokens of each segment that stand before a column of the input."""
        return [int((positions < column).sum()) for _, _, positions in self.segments()]

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep, reorder or repeat rows (beam search): row i becomes the old row rows[i]."""
        chosen = [row * self.n_heads + head for row in rows for head in range(self.n_heads)]
        if chosen == list(range(len(self.lengths))):
            return
        starts, lengths, room = self.starts, self.lengths, self.room
        where = [torch.arange(starts[i], starts[i] + lengths[i]) for i in chosen]
        self._gather(where, [room[i] for i in chosen])

    @staticmethod
    def joined(stores: Sequence[PackedStore]) -> PackedStore:
        """A store with copies of the rows of several stores, one after the other."""
        new = copy.copy(stores[0])
        new.lengths = [n for store in stores for n in store.lengths]
        new.room = [n for store in stores for n in store.room]
        new._place()
        for name, _ in list(new._buffers()):
            setattr(new, name, torch.cat([getattr(store, name) for store in stores]))
        return new

    def _grow(self, new: Sequence[int]) -> None:
        """Give every segment that is short the room for `new` tokens, and slack."""
        needed = [n + more for n, more in zip(self.lengths, new, strict=True)]
        # the buffers move as a whole, so every segment gets its slack back at once
        slack = max(MIN_SLACK, sum(needed) // len(needed) // 16)
        room = [need + slack for need in needed]
        everything = [torch.arange(s, s + n) for s, n in zip(self.starts, self.lengths, strict=True)]
        self._gather(everything, room)

    def _replace(self, kept: Sequence[Tensor], room: list[int]) -> None:
        self._gather([start + index.cpu() for start, index in zip(self.starts, kept, strict=True)], room)

    def _gather(self, where: Sequence[Tensor], room: list[int]) -> None:
        """Move the tokens at the flat indices `where` (host, one tensor per segment) into new buffers."""
        lengths = [int(index.numel()) for index in where]
        source = torch.cat(list(where)).to(self.keys.device) if where else torch.empty(0, dtype=torch.long)
        self.lengths, self.room = lengths, room
        self._place()
        target = torch.cat([torch.arange(s, s + n) for s, n in zip(self.starts, lengths, strict=True)])
        target = target.to(self.keys.device)
        dense = sum(room) == sum(lengths)
        for name, old in list(self._buffers()):
            if dense:
                new = old.index_select(0, source)
            else:
                new = old.new_empty((sum(room), *old.shape[1:])).index_copy_(0, target, old.index_select(0, source))
            setattr(self, name, new)

    def _place(self) -> None:
        """Recompute the starts from the room of each segment."""
        self.starts = [0]
        for room in self.room[:-1]:
            self.starts.append(self.starts[-1] + room)
