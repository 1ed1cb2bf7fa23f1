"""A gated MLP whose gate and up projections are one product."""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from workers import trial
from workers.linear import GATES, PackedLinear


class PackedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))``, gate and up in one product; ``down`` stays what it is."""

    #: The layers of the model that a product stands in for.
    merged: ClassVar = {"gate_up": ("gate_proj", "up_proj")}

    def __init__(
        self,
        activation: Callable[[Tensor], Tensor],
        gate: nn.Linear,
        up: nn.Linear,
        down: nn.Module,
        format: torch.dtype,
    ) -> None:
        super().__init__()
        self.gate_up = PackedLinear(gate, format, up=up, gate=activation)
        self.down_proj = down

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.gate_up(x))
        return out


def packed_mlp(format: torch.dtype, layer: nn.Module) -> PackedMLP | None:
    """One in the place of whatever has a gate, an up and a down projection, and multiplies as we would; else None."""
    gate, up, down = (getattr(layer, f"{name}_proj", None) for name in ("gate", "up", "down"))
    if not (type(gate) is type(up) is nn.Linear and isinstance(down, nn.Module)):
        return None
    for activation in GATES:
        if trial.stands_in(partial(_plain, activation, gate, up, down), layer, gate.in_features):
            return PackedMLP(activation, gate, up, down, format)
    return None


def _plain(
    activation: Callable[[Tensor], Tensor], gate: nn.Module, up: nn.Module, down: nn.Module, x: Tensor
) -> Tensor:
    out: Tensor = down(activation(gate(x)) * up(x))
    return out
