"""Replaces a model's linear layers with packed ones, in place, so that no weight is held twice."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from protocol.plan import WeightsName
from workers.kernels.compiler import CompileError
from workers.linear import PackedLinear, kernel, unsupported

#: `plain` is torch's own layers, in whatever the model was loaded as.
PLAIN = "plain"

logger = logging.getLogger(__name__)


def pack(module: PreTrainedModel, weights: WeightsName) -> torch.dtype:
    """Pack all linear layers of a model; ``auto`` is float32 where that is possible, and plain elsewhere.

    Returns what the weights are held in now. An embedding that shares the head's weight keeps it. Raises ValueError when
    ``weights`` can't be had, with the reason.
    """
    if weights == PLAIN:
        return module.dtype
    format = torch.float32 if weights == "auto" else getattr(torch, weights)
    reason = _unsupported(module, format)
    if reason is None:
        # One at a time, each weight freed before the next is packed.
        for parent, name in [(parent, name) for parent, name, _ in _linears(module)]:
            setattr(parent, name, PackedLinear(getattr(parent, name), format))
        logger.info("linear layers packed as %s", format)
        return format
    if weights != "auto":
        raise ValueError(f"weights {weights!r}: {reason}")
    logger.warning("linear layers are torch's own: %s", reason)
    return module.dtype


def _unsupported(module: nn.Module, format: torch.dtype) -> str | None:
    try:
        kernel()
    except CompileError as error:
        return f"the C++ kernel could not be compiled: {error}"
    return next(filter(None, (unsupported(linear.weight, format) for _, _, linear in _linears(module))), None)


def _linears(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Every `nn.Linear` with its parent and its name there; subclasses do something else besides."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                yield parent, name, child
