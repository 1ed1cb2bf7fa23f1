"""A gated MLP whose gate and up projections are one product."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from workers import trial
from workers.linear import PackedLinear


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


def packed_mlp(format: torch.dtype, layer: nn.Module) -> PackedMLP | None:
    """One in the place of whatever has a gate, an up and a down projection, and multiplies as we would; else None."""
    gate, up, down = (getattr(layer, f"{name}_proj", None) for name in ("gate", "up", "down"))
    if not (type(gate) is type(up) is nn.Linear and isinstance(down, nn.Module)):
        return None
    if not trial.stands_in(lambda x: down(silu(gate(x)) * up(x)), layer, gate.in_features):
        return None
    return PackedMLP(gate, up, down, format)
