"""Where transformers' attention layers meet our paged KV: one function registered with `AttentionInterface`.

The layers pass no handle of ours through (some model classes drop unknown keyword arguments), so the step under way
stands in a context variable that the runner sets around the forward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from workers.attention.base import Attributes

#: The name models are told to use as their ``attn_implementation``.
NAME = "tokenbus_paged"


class Attend(Protocol):
    """Attention of one layer over a whole ragged step."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, attributes: Attributes) -> Tensor:
        """query ``[T, H, Dk]``, key ``[T, Hkv, Dk]``, value ``[T, Hkv, Dv]`` -> ``[T, H, Dv]``."""
        ...


_attend: ContextVar[Attend] = ContextVar("attend")


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Within the block, every attention layer of a model using `NAME` calls ``attend``."""
    token = _attend.set(attend)
    try:
        yield
    finally:
        _attend.reset(token)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The signature transformers calls: q ``[1, H, T, Dk]``, k and v ``[1, Hkv, T, D]`` -> ``[1, T, H, Dv]``.

    ``attention_mask`` is always None, since no mask is registered under our name: causality comes from positions.
    """
    del attention_mask
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    attributes = Attributes(scaling, sliding_window, softcap, s_aux)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    layer: Any = module.layer_idx
    return _attend.get()(layer, q, k, v, attributes).unsqueeze(0), None


AttentionInterface.register(NAME, paged_attention)
