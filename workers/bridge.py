"""Where transformers' attention layers meet our paged KV: one function registered with `AttentionInterface`.

The layers pass no handle of ours through (some model classes drop unknown keyword arguments), so the step under way
stands in a context variable that the runner sets around the forward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from workers.attention.base import AttentionBackend, Attributes, RaggedBatch

#: The name models are told to use as their ``attn_implementation``.
NAME = "tokenbus_paged"


class Attend(Protocol):
    """Attention of one layer over a whole ragged step."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, attributes: Attributes, /) -> Tensor:
        """query ``[T, H, Dk]``, key ``[T, Hkv, Dk]``, value ``[T, Hkv, Dv]`` -> ``[T, H, Dv]``."""
        ...


_attend: ContextVar[Attend] = ContextVar("attend")


@dataclass(slots=True)
class PagedStep:
    """Attention over the batch of one step, in any layer. ``wanted``: of which tokens anybody reads what the last layer gives,
    int64 ``[n]``, ascending; None: of all. ``ahead``: what was computed of layers whose turn is still to come."""

    backend: AttentionBackend
    batch: RaggedBatch
    wanted: Tensor | None = None
    ahead: Tensor | None = None

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, attributes: Attributes) -> Tensor:
        return self.backend.attend(layer, query, key, value, self.batch, attributes)


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Within the block, every attention layer of a model using `NAME` calls ``attend``."""
    token = _attend.set(attend)
    try:
        yield
    finally:
        _attend.reset(token)


def under_way() -> Attend | None:
    """What the innermost such block calls; None outside of any."""
    return _attend.get(None)


def attributes_of(
    key_dim: int,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Attributes:
    """What a layer of transformers asks of its attention function by keywords."""
    return Attributes(key_dim**-0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)


def _paged_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """The signature transformers calls: q ``[1, H, T, Dk]``, k and v ``[1, Hkv, T, D]`` -> ``[1, T, H, Dv]``.

    ``attention_mask`` is always None, since no mask is registered under our name: causality comes from positions.
    """
    del attention_mask
    attributes = attributes_of(query.shape[-1], **given)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    layer: Any = module.layer_idx
    return _attend.get()(layer, q, k, v, attributes).unsqueeze(0), None


AttentionInterface.register(NAME, _paged_attention)
