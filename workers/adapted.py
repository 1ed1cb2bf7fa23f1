"""Adapters of torch's own linear layers.

Those in memory lie stacked, so that a layer multiplies the rows that have one by all of them at once and keeps, of each row,
what is its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, one_hot


class Share:
    """Of the step under way: ``tokens`` int64 ``[n]``, which of its tokens have an adapter; ``own`` ``[n, places * rank]``, 1
    where a column of the stacked product is of the token's own adapter, else 0. None: nobody has one."""

    def __init__(self, places: int, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        self.places, self.rank, self._dtype, self._device = places, rank, dtype, device
        self.tokens: Tensor | None = None
        self.own = torch.empty(0)

    def set(self, place: Tensor | None) -> None:
        """place: int64 ``[T]``, of each token, -1 where it has no adapter; None: no token has one."""
        if place is None:
            self.tokens = None
            return
        tokens = (place >= 0).nonzero()[:, 0]
        own = one_hot(place[tokens], self.places).repeat_interleave(self.rank, dim=1)
        self.tokens, self.own = tokens.to(self._device), own.to(self._device, self._dtype)

    def adapt(self, owner: nn.Module, name: str) -> AdaptedLinear | None:
        """Put an adapted layer in the place of this linear one, if it is one."""
        base = owner.get_submodule(name)
        # A subclass does something else besides.
        if type(base) is not nn.Linear:
            return None
        adapted = AdaptedLinear(base, self)
        setattr(owner, name, adapted)
        return adapted


class AdaptedLinear(nn.Module):
    """A linear layer, and what adapters add to it."""

    def __init__(self, base: nn.Linear, share: Share) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.widths = base.in_features, (base.out_features,)
        like: Any = {"dtype": base.weight.dtype, "device": base.weight.device}
        columns = share.places * share.rank
        self.down = nn.Parameter(torch.zeros(columns, base.in_features, **like), requires_grad=False)
        self.up = nn.Parameter(torch.zeros(columns, base.out_features, **like), requires_grad=False)
        self._share = share

    def forward(self, x: Tensor) -> Tensor:
        """x ``[1, T, in]`` -> ``[1, T, out]``."""
        y: Tensor = self.base(x)
        tokens = self._share.tokens
        if tokens is not None:
            inner = linear(x[0, tokens], self.down) * self._share.own
            y[0].index_add_(0, tokens, linear(inner, self.up.T))
        return y

    def put(self, place: int, weights: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Fill a place with an adapter's A ``[rank, in]`` and B ``[out, rank]`` of the one part there is, or with nothing."""
        columns = slice(place * self._share.rank, (place + 1) * self._share.rank)
        self.down[columns], self.up[columns] = 0, 0
        for down, up in weights.values():
            for stack, weight in ((self.down, down), (self.up, up.T)):
                stack[columns.start : columns.start + len(weight)] = weight.to(stack)
