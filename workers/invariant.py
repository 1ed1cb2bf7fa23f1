"""Batch invariance where it isn't had for nothing: every token computed in the same way, whoever shares the step.

On the CPU in float32 our kernels sum each row by itself, in one order. torch's products choose theirs by the number of rows,
and an attention backend may by the number of queries. Here products get their rows a fixed number at a time, and attention its
queries one by one (cf. He et al., "Defeating Nondeterminism in LLM Inference", 2025); `selftest.check_invariant` proves what
comes of it.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, pad, silu, softplus
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from workers.attention import AttentionBackend, Attributes, RaggedBatch

#: Rows of every product. A step of few tokens computes some in vain, one of many reads each weight as often.
_ROWS = 16
#: ``x @ weight``, in all its spellings.
_PRODUCTS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
#: Computed element by element; on the CPU one way in whole vectors, another in what is left over where a thread's part ends.
_ELEMENTWISE = {gelu, silu, softplus, torch.exp, torch.sigmoid, torch.tanh, Tensor.exp, Tensor.sigmoid, Tensor.tanh}
#: Elements that fill whole vectors; and so many, at most, torch leaves to one thread (its gelu; others twice as many).
_VECTORS, _PART = 64, 16384


class FixedShapes(TorchFunctionMode):
    """Within the block, products of rows with a weight take `_ROWS` rows at a time, and activations whole vectors."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is linear or (function in _PRODUCTS and args[1].dim() == 2):
            return _rows(lambda x: function(x, *args[1:], **kwargs), args[0])
        if function is torch.addmm:
            bias, x, weight = args
            return _rows(lambda tile: torch.addmm(bias, tile, weight, **kwargs), x)
        if function in _ELEMENTWISE:
            return _elements(lambda x: function(x, *args[1:], **kwargs), args[0])
        return function(*args, **kwargs)


def _rows(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """x ``[..., in]`` -> ``[..., out]``."""
    rows = x.reshape(-1, x.shape[-1])
    tiles = pad(rows, (0, 0, 0, -len(rows) % _ROWS)).split(_ROWS)
    out = torch.cat([product(tile) for tile in tiles])
    return out[: len(rows)].view(*x.shape[:-1], out.shape[-1])


def _elements(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    parts = pad(x.reshape(-1), (0, -x.numel() % _VECTORS)).split(_PART)
    return torch.cat([activation(part) for part in parts])[: x.numel()].view(x.shape)


def fix_shapes(module: PreTrainedModel) -> None:
    """Compute a model's products so, from now on; experts one by one, if it has any."""
    if module._can_set_experts_implementation():  # noqa: SLF001 - set_experts_implementation only warns where it can't
        module.set_experts_implementation("eager")
    plain = module.forward

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with FixedShapes():
            return plain(*args, **kwargs)

    module.forward = forward


def one_by_one(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """A backend that attends to one query at a time, however many tokens a row has; itself if it makes no difference to it."""
    if backend.batch_invariant:
        return backend

    class OneByOne(backend):  # type: ignore[valid-type, misc]
        in_parts = False
        # What is proven at load is the pass as it is launched kernel by kernel.
        capturable = False
        _batch: RaggedBatch | None = None

        def attend(
            self, layer: int, query: Tensor, key: Tensor, value: Tensor, batch: RaggedBatch, attributes: Attributes
        ) -> Tensor:
            if batch is not self._batch:  # a step's first layer
                self._batch, self._split = batch, split(batch)
            output: Tensor = super().attend(layer, query, key, value, self._split, attributes)
            return output

    return OneByOne


def split(batch: RaggedBatch) -> RaggedBatch:
    """The same tokens, each a row of its own."""
    lengths = batch.query_start.diff()
    tokens = len(batch.cache_slots)
    ends = batch.query_start[1:].repeat_interleave(lengths)
    start = torch.arange(tokens + 1, dtype=torch.int32, device=lengths.device)
    return RaggedBatch(
        query_start=start,
        context_len=batch.context_len.repeat_interleave(lengths) - (ends - start[1:]),
        block_table=batch.block_table.repeat_interleave(lengths, dim=0),
        cache_slots=batch.cache_slots,
        max_query_len=1,
        max_context_len=batch.max_context_len,
    )
