"""Replaces a model's layers with ours, in place and one at a time, so that no two copies of its weights are ever held."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import nn
from transformers import PreTrainedModel

from protocol.plan import WeightsName
from workers.kernels.compiler import CompileError
from workers.linear import PackedLinear, kernel, unsupported
from workers.linked_layers import link_layers
from workers.norm import rms_norm
from workers.packed_attention import packed_attention
from workers.packed_layer import packed_layer
from workers.packed_mlp import packed_mlp

#: torch's own layers, in whatever the model was loaded as.
PLAIN: Final = "plain"
#: Weights and activations of 8 bits.
INT8 = "int8"

logger = logging.getLogger(__name__)


@torch.inference_mode()
def pack(module: PreTrainedModel, weights: WeightsName) -> torch.dtype:
    """Pack all linear layers of a model, and fuse what can be; ``auto`` is float32 where that is possible, and plain elsewhere.

    Returns what the weights are held in now. An embedding that shares the head's weight keeps it. Raises ValueError when
    ``weights`` can't be had, with the reason.
    """
    if weights == PLAIN or (weights == "auto" and module.device.type != "cpu"):
        return module.dtype
    format = torch.float32 if weights == "auto" else getattr(torch, weights)
    reason = _unsupported(module)
    if reason is None:
        for build in (packed_attention, packed_mlp, _norm, _packed_linear, packed_layer):
            _replace(module, partial(build, format))
        link_layers(module)
        for parameter in module.parameters():
            # What is left may be a view of the weights' whole file in memory.
            parameter.data = parameter.data.clone()
        logger.info("linear layers packed as %s", format)
        return format
    if weights != "auto":
        raise ValueError(f"weights {weights!r}: {reason}")
    logger.warning("linear layers are torch's own: %s", reason)
    return module.dtype


def _unsupported(module: nn.Module) -> str | None:
    try:
        kernel()
    except CompileError as error:
        return f"the C++ kernel could not be compiled: {error}"
    linears = (layer for layer in module.modules() if type(layer) is nn.Linear)
    return next(filter(None, (unsupported(linear.weight) for linear in linears)), None)


def _replace(module: nn.Module, build: Callable[[nn.Module], nn.Module | None]) -> None:
    """Put what ``build`` makes of a layer in its place, everywhere below ``module``."""
    for name, child in list(module.named_children()):
        ours = build(child)
        if ours is None:
            _replace(child, build)
        else:
            setattr(module, name, ours)
        del child


def _packed_linear(format: torch.dtype, layer: nn.Module) -> nn.Module | None:
    # A subclass does something else besides.
    return PackedLinear(layer, format) if type(layer) is nn.Linear else None


def _norm(_: torch.dtype, layer: nn.Module) -> nn.Module | None:
    return rms_norm(layer)
