"""A linear layer whose weight lies packed for `kernels/linear.cpp`, in 32, 16 or 8 bits; what goes in and out is float32."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int64, c_void_p
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, silu

from workers import huge_pages
from workers.kernels import FOLDER
from workers.kernels.compiler import load_library

SOURCE = FOLDER / "linear.cpp"

#: What a weight can be packed as, in the order of the kernel's table.
FORMATS = (torch.float32, torch.bfloat16, torch.int8)


def gelu_tanh(x: Tensor) -> Tensor:
    """The GELU that is made with tanh."""
    return gelu(x, approximate="tanh")


#: What a gate can be made with, in the order of the kernel's, of which the first is that there is none.
GATES: tuple[Callable[[Tensor], Tensor], ...] = (silu, gelu_tanh)
INT8_MAX = 127
#: Inputs of an output feature that share a word, and what is added to their weights, which are unsigned so.
INT8_INPUTS, INT8_ZERO = 4, 128


class _Linear(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("weight", "scale", "bias", "adapters")),
        *((name, c_int64) for name in ("in_features", "out_features", "format", "gate")),
    )


class Adapters(Protocol):
    """What is added to a product's outputs, before anything else is done with them."""

    @property
    def address(self) -> int:
        """Of the kernel's `Adapters`."""

    def runs(self, rows: int) -> int | None:
        """The address of the kernel's `Runs` of a step of so many rows; None if nobody has an adapter."""


class PackedLinear(nn.Module):
    """Stands in for an `nn.Linear` of float32 on the CPU, whose weight it doesn't keep.

    A row of the output is the same bits whatever other rows there are. int8 is one scale per output feature; then inputs
    are rounded to 8 bits, too, each 64 of a row by a scale of their own. ``widths``: the output features of each of the layers
    that it stands in for. Raises CompileError, or ValueError for a layer that doesn't fit.
    """

    _adapters: Adapters | None = None

    def __init__(
        self,
        linear: nn.Linear,
        format: torch.dtype = torch.float32,
        *,
        up: nn.Linear | None = None,
        gate: Callable[[Tensor], Tensor] = silu,
        widths: Sequence[int] = (),
    ) -> None:
        """With ``up`` the output is ``gate(linear(x)) * up(x)``, with one of the `GATES`. ``widths``: of the layers whose outputs
        follow each other in ``linear``'s, if there are several."""
        super().__init__()
        self.gated = up is not None
        self.widths = tuple(widths) or tuple(each.out_features for each in (linear, up) if each is not None)
        self.in_features, self.out_features, self.format = linear.in_features, linear.out_features, format
        self._kernel = kernel().linear
        columns = kernel().panel_columns()
        if up is None:
            weight, scale, bias = _rows(linear, format, columns)
        else:
            # By turns half a panel of gates and half a panel of what they let through.
            pairs = zip(_rows(linear, format, columns // 2), _rows(up, format, columns // 2), strict=True)
            weight, scale, bias = (
                torch.stack([tensor.unflatten(0, (-1, columns // 2)) for tensor in pair], 1).flatten(0, 2)
                for pair in pairs
            )
        # Plain attributes, not buffers: the kernel is handed their addresses, so nobody may move them.
        self._tensors = (_panels(weight, columns), scale, bias)
        addresses = (tensor.data_ptr() for tensor in self._tensors)
        self._linear = _Linear(*addresses, None, self.in_features, self.out_features, FORMATS.index(format))
        self._linear.gate = 1 + GATES.index(gate) if self.gated else 0

    @property
    def address(self) -> int:
        """Of the kernel's `Linear`."""
        return ctypes.addressof(self._linear)

    def adapt(self, adapters: Adapters) -> None:
        """Add to every product, from now on, what they say."""
        self._adapters, self._linear.adapters = adapters, adapters.address

    def runs(self, rows: int) -> int | None:
        """The address of the kernel's `Runs` of a step of so many rows; None if nobody has an adapter here."""
        return None if self._adapters is None else self._adapters.runs(rows)

    @property
    def nbytes(self) -> int:
        """All that a product reads besides its input."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 ``[..., in_features]`` -> ``[..., out_features]``. Raises ValueError for anything else."""
        if x.dtype != torch.float32 or x.shape[-1] != self.in_features or x.device.type != "cpu":
            raise ValueError(f"expected float32 [..., {self.in_features}] on the CPU, got {x.dtype} {list(x.shape)}")
        x = x.contiguous()
        y = torch.empty(*x.shape[:-1], self.out_features)
        rows = x.numel() // self.in_features
        self._kernel(
            self.address, x.data_ptr(), rows, None, y.data_ptr(), self.runs(rows), None, torch.get_num_threads()
        )
        return y


def unsupported(weight: Tensor) -> str | None:
    """The reason a weight can't be packed, or None when it can."""
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return f"only float32 weights on the CPU are packed, not {weight.dtype} on {weight.device}"
    return None


@cache
def kernel() -> ctypes.CDLL:
    """Raises CompileError."""
    library = load_library(SOURCE)
    library.linear.argtypes = (c_void_p, c_void_p, c_int64, *(c_void_p,) * 4, c_int64)
    library.linear.restype = None
    library.group_rows.argtypes, library.group_rows.restype = (c_void_p, c_int64, c_void_p, c_void_p), c_int64
    library.rms_norm.argtypes = (c_void_p, c_int64, c_int64, c_void_p, c_float, c_void_p, c_void_p, c_int64)
    library.rms_norm.restype = None
    library.panel_columns.argtypes, library.panel_columns.restype = (), c_int64
    return library


def _rows(linear: nn.Linear, format: torch.dtype, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight in the format, scale and bias of a layer, one row for each output feature, padded with zeros to a multiple."""
    weight = linear.weight.detach()
    if reason := unsupported(weight):
        raise ValueError(reason)
    scale = torch.ones(linear.out_features)
    if format == torch.int8:
        scale = (weight.abs().amax(dim=1) / INT8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
        weight = (weight / scale[:, None]).round()
    bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
    padding = (0, -linear.out_features % multiple)
    weight = weight.to(format)
    if any(padding):  # pad copies even where there is nothing to add
        weight = pad(weight, (0, 0, *padding))
    return weight, pad(scale, padding), pad(bias, padding)


def _panels(weight: Tensor, columns: int) -> Tensor:
    """Weight ``[out, in]``, its rows whole panels, in the order that the kernel describes for its format."""
    # [panel, half, column, k]
    pieces = weight.view(-1, 2, columns // 2, weight.shape[1])
    if weight.dtype == torch.int8:
        words = pad(pieces, (0, -weight.shape[1] % INT8_INPUTS)).unflatten(3, (-1, INT8_INPUTS))
        return huge_pages.copy(words.permute(0, 3, 1, 2, 4)).view(torch.uint8).bitwise_xor_(INT8_ZERO)
    return huge_pages.copy(pieces.permute((0, 3, 1, 2) if weight.dtype == torch.float32 else (0, 3, 2, 1)))
