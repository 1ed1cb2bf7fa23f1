"""Replaces a model's layers with ours, in place and one at a time, so that no two copies of its weights are ever held."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import PreTrainedModel

from protocol.plan import WeightsName
from workers import trial
from workers.kernels.compiler import CompileError
from workers.linear import PackedLinear, kernel, unsupported
from workers.norm import RMSNorm
from workers.packed_attention import packed_attention

#: torch's own layers, in whatever the model was loaded as.
PLAIN = "plain"
#: Weights and activations of 8 bits.
INT8 = "int8"

logger = logging.getLogger(__name__)


class PackedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``, gate and up in one product; ``down`` stays what it is."""

    #: The layers of the model that a product stands in for.
    merged: ClassVar = {"gate_up": ("gate_proj", "up_proj")}

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Module, format: torch.dtype) -> None:
        super().__init__()
        self.gate_up = PackedLinear(gate, format, up=up)
        self.down_proj = down

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.gate_up(x))
        return out


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
        for build in (packed_attention, _packed_mlp, _norm, _packed_linear):
            _replace(module, partial(build, format))
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


def _packed_mlp(format: torch.dtype, layer: nn.Module) -> nn.Module | None:
    """Whatever has a gate, an up and a down projection, and multiplies as we would."""
    gate, up, down = (getattr(layer, f"{name}_proj", None) for name in ("gate", "up", "down"))
    if not (type(gate) is type(up) is nn.Linear and isinstance(down, nn.Module)):
        return None
    if not _agree(layer, lambda x: down(silu(gate(x)) * up(x)), gate.in_features):
        return None
    return PackedMLP(gate, up, down, format)


def _norm(_: torch.dtype, layer: nn.Module) -> nn.Module | None:
    """Whatever is called an RMSNorm, and is one: some add 1 to their weight."""
    epsilon = getattr(layer, "variance_epsilon", None) or getattr(layer, "eps", None)
    weight = getattr(layer, "weight", None)
    if not type(layer).__name__.endswith("RMSNorm") or epsilon is None or weight is None:
        return None
    ours = RMSNorm(weight, epsilon)
    return ours if _agree(layer, ours, len(weight)) else None


def _agree(layer: nn.Module, ours: Callable[[Tensor], Tensor], width: int) -> bool:
    """Whether two ways to compute a layer give the same of random rows."""
    x = torch.randn(1, trial.ROWS, width, generator=torch.Generator().manual_seed(0))
    return trial.agree(ours(x), layer(x))
