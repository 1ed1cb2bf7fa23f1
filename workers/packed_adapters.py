"""Adapters of packed linear layers, for `kernels/lora.h`: what they add is part of the layer's own product."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from workers.linear import PackedLinear, kernel


class _Runs(ctypes.Structure):
    _fields_ = (("order", c_void_p), ("runs", c_void_p), ("rows", c_int64), ("count", c_int64))


class _Adapters(ctypes.Structure):
    _fields_ = (*((name, c_void_p) for name in ("down", "up", "spans")), ("vectors", c_int64), ("up_rows", c_int64))


class PackedShare:
    """Which rows of the step under way go through which adapter."""

    def __init__(self, places: int, rank: int) -> None:
        self.places, self.rank = places, rank
        self._group = kernel().group_rows
        self._tensors: tuple[Tensor, ...] = ()
        self._runs: _Runs | None = None

    def set(self, place: Tensor | None) -> None:
        """place: int64 ``[T]``, of each token, -1 where it has no adapter; None: no token has one."""
        if place is None:
            self._runs = None
            return
        rows = len(place)
        order, runs = torch.empty(rows, dtype=torch.int64), torch.empty(rows, 3, dtype=torch.int64)
        count = self._group(place.data_ptr(), rows, order.data_ptr(), runs.data_ptr())
        self._tensors = (order, runs)
        self._runs = _Runs(order.data_ptr(), runs.data_ptr(), rows, count)

    def runs(self, rows: int) -> int | None:
        """As the adapters' own."""
        if self._runs is None:
            return None
        if rows != self._runs.rows:
            raise ValueError(f"{rows} rows of a step of {self._runs.rows} tokens can't be told apart by adapter")
        return ctypes.addressof(self._runs)

    def adapt(self, owner: nn.Module, name: str) -> PackedAdapters | None:
        """The adapters of this layer from now on, if it is packed."""
        layer = owner.get_submodule(name)
        if not isinstance(layer, PackedLinear):
            return None
        adapters = PackedAdapters(layer, self)
        layer.adapt(adapters)
        return adapters


class PackedAdapters:
    """Low-rank weights beside a packed layer, by place. Where it stands in for several, A is theirs one below the other, and
    B has blocks along its diagonal, of which only what isn't zero everywhere is kept."""

    def __init__(self, layer: PackedLinear, share: PackedShare) -> None:
        self._share = share
        self.in_features, self.widths = layer.in_features, layer.widths
        self._layout = _layout(layer.widths, layer.gated, kernel().panel_columns(), share.rank)
        half = kernel().panel_columns() // 2
        vectors = -(-len(layer.widths) * share.rank // half)
        # Plain attributes, not buffers: the kernel is handed their addresses, so nobody may move them.
        self._down = torch.zeros(share.places, vectors, layer.in_features, half)
        self._up = torch.zeros(share.places, *self._layout.source.shape)
        addresses = (tensor.data_ptr() for tensor in (self._down, self._up, self._layout.spans))
        self._struct = _Adapters(*addresses, vectors, len(self._layout.source))

    def put(self, place: int, weights: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Fill a place with an adapter's weights: of each part that it changes A ``[rank, in]`` and B ``[out, rank]``."""
        rank = self._share.rank
        _, vectors, inputs, half = self._down.shape
        down, up = torch.zeros(vectors * half, inputs), torch.zeros(len(self.widths) * rank, sum(self.widths) + 1)
        for part, (a, b) in weights.items():
            rows, first = part * rank, sum(self.widths[:part])
            down[rows : rows + len(a)] = a
            up[rows : rows + len(a), first : first + len(b)] = b.T
        self._down[place] = down.unflatten(0, (vectors, half)).transpose(1, 2)
        self._up[place] = up.take(self._layout.source)

    @property
    def address(self) -> int:
        """Of the kernel's `Adapters`."""
        return ctypes.addressof(self._struct)

    def runs(self, rows: int) -> int | None:
        """The address of the kernel's `Runs` of a step of so many rows; None if nobody has an adapter. Raises ValueError for more
        or fewer rows than the step has."""
        return self._share.runs(rows)


@dataclass(frozen=True, slots=True)
class _Layout:
    """``spans``: int64 ``[panels, 4]``, as the kernel has them. ``source``: int64 ``[up_rows, columns]``, where each number lies
    in a flat B ``[parts * rank, outputs + 1]`` whose last column is zeros."""

    spans: Tensor
    source: Tensor


@cache
def _layout(widths: tuple[int, ...], gated: bool, columns: int, rank: int) -> _Layout:
    features, real = _features(widths, gated, columns)
    starts = torch.tensor([sum(widths[:part]) for part in range(len(widths) + 1)])
    part = torch.bucketize(features, starts[1:], right=True)
    lowest, highest = part.amin(dim=2), part.amax(dim=2)
    spanned = (highest - lowest + 1).amax(dim=1)
    # Both halves of a panel take as many parts; more than they need do no harm.
    first = torch.minimum(lowest, len(widths) - spanned[:, None]) * rank
    counts = spanned * rank
    begin = counts.cumsum(0) - counts
    panel = torch.arange(len(counts)).repeat_interleave(counts)
    inner = first[panel] + (torch.arange(len(panel)) - begin[panel])[:, None]
    total = sum(widths)
    outputs = features.where(real, total)[panel]
    source = inner[..., None] * (total + 1) + outputs
    return _Layout(torch.cat([first, counts[:, None], begin[:, None]], dim=1), source.flatten(1))


def _features(widths: tuple[int, ...], gated: bool, columns: int) -> tuple[Tensor, Tensor]:
    """The output feature, of all parts, in each column of a packed layer's panels, int64 ``[panels, 2, columns / 2]``, and which
    columns aren't padding."""
    half = columns // 2
    if gated:
        width = widths[0]
        column = torch.arange(-(-width // half) * half).view(-1, 1, half).expand(-1, 2, -1)
        return column.clamp(max=width - 1) + torch.tensor([[0], [width]]), column < width
    total = sum(widths)
    column = torch.arange(-(-total // columns) * columns).view(-1, 2, half)
    return column.clamp(max=total - 1), column < total
