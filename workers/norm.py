"""RMS normalisation in one pass, where transformers' own takes seven."""

from typing import Any

import torch
from torch import Tensor, nn

from workers import trial
from workers.linear import kernel


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + epsilon)``, and what is added to it, for float32 on the CPU. Raises CompileError."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self._weight, self.epsilon = weight.detach().clone(), epsilon
        self._kernel = kernel().rms_norm

    @property
    def width(self) -> int:
        return len(self._weight)

    @property
    def weight_address(self) -> int:
        return self._weight.data_ptr()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x and what is added: float32 ``[..., width]``. Raises ValueError for anything else."""
        width = self.width
        for given in (x,) if residual is None else (x, residual):
            if given.dtype != torch.float32 or given.shape != (*x.shape[:-1], width) or given.device.type != "cpu":
                raise ValueError(f"expected float32 [..., {width}] on the CPU, got {given.dtype} {list(given.shape)}")
        x = x.contiguous()
        residual = None if residual is None else residual.contiguous()
        y = torch.empty_like(x)
        self._kernel(
            x.data_ptr(),
            x.numel() // width,
            width,
            self._weight.data_ptr(),
            self.epsilon,
            None if residual is None else residual.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y


def rms_norm(layer: Any) -> RMSNorm | None:
    """One in the place of whatever is called an RMSNorm, and is one, though some add 1 to their weight; else None."""
    epsilon = getattr(layer, "variance_epsilon", None) or getattr(layer, "eps", None)
    weight = getattr(layer, "weight", None)
    if not type(layer).__name__.endswith("RMSNorm") or epsilon is None or weight is None:
        return None
    for factor in (weight, 1 + weight):
        ours = RMSNorm(factor, epsilon)
        if trial.stands_in(ours, layer, len(weight)):
            return ours
    return None
