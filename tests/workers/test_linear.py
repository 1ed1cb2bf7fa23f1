"""Packed linear layers against torch's own, and the promise that a row's output doesn't depend on its company."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear, silu

from workers.linear import FORMATS, INT8_MAX, PackedLinear

SIZES = st.integers(1, 80)


def layer(inputs: int, outputs: int, *, bias: bool, seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@settings(max_examples=200, deadline=None)
@given(rows=st.integers(1, 70), inputs=SIZES, outputs=SIZES, bias=st.booleans(), seed=st.integers(0, 99))
def test_float32_is_torchs_linear(rows, inputs, outputs, bias, seed):
    module = layer(inputs, outputs, bias=bias, seed=seed)
    x = torch.randn(rows, inputs)
    assert relative(PackedLinear(module)(x), module(x)) < 1e-5


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 70), pairs=SIZES, outputs=SIZES, bias=st.booleans(), seed=st.integers(0, 99))
def test_narrow_formats_are_torchs_linear_on_the_rounded_weight(rows, pairs, outputs, bias, seed):
    module = layer(2 * pairs, outputs, bias=bias, seed=seed)
    x = torch.randn(rows, 2 * pairs)
    rounded = module.weight.bfloat16().float()
    assert relative(PackedLinear(module, torch.bfloat16)(x), linear(x, rounded, module.bias)) < 1e-5
    scale = module.weight.abs().amax(dim=1, keepdim=True) / INT8_MAX
    rounded = (module.weight / scale).round() * scale
    assert relative(PackedLinear(module, torch.int8)(x), linear(x, rounded, module.bias)) < 1e-5


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_bits_in_any_company(format, threads):
    """Rows cross the borders of tiles (6) and chunks (96); the layer is large enough for several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        packed = PackedLinear(layer(256, 200, bias=True, seed=3), format)
        x = torch.randn(205, 256)
        alone = torch.cat([packed(row[None]) for row in x])
        for first, last in [(0, 205), (0, 70), (5, 18), (90, 188), (204, 205)]:
            assert torch.equal(packed(x[first:last]), alone[first:last])
    finally:
        torch.set_num_threads(before)


def test_shapes_and_layouts_of_the_input():
    module = layer(24, 40, bias=True, seed=1)
    packed = PackedLinear(module)
    x = torch.randn(2, 24, 3).transpose(1, 2)
    assert packed(x).shape == (2, 3, 40)
    torch.testing.assert_close(packed(x), module(x))
    assert packed(torch.empty(0, 24)).shape == (0, 40)


def test_a_weight_of_zeros_survives_its_scale():
    module = layer(8, 20, bias=False, seed=1)
    module.weight[3] = 0
    out = PackedLinear(module, torch.int8)(torch.randn(4, 8))
    assert torch.equal(out[:, 3], torch.zeros(4))
    assert out.isfinite().all()


@pytest.mark.parametrize("x", [torch.randn(2, 7), torch.randn(2, 8, dtype=torch.float64)])
def test_what_the_kernel_would_misread_is_refused(x):
    with pytest.raises(ValueError, match=r"expected float32 \[\.\.\., 8\]"):
        PackedLinear(layer(8, 8, bias=False, seed=1))(x)


def test_layers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="even number of inputs, not 7"):
        PackedLinear(layer(7, 8, bias=False, seed=1), torch.int8)
    with pytest.raises(ValueError, match="only float32 weights"):
        PackedLinear(layer(8, 8, bias=False, seed=1).bfloat16())


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 70), inputs=SIZES, outputs=SIZES, bias=st.booleans(), seed=st.integers(0, 99))
def test_a_gated_layer_is_silu_times_up(rows, inputs, outputs, bias, seed):
    gate, up = (layer(inputs, outputs, bias=bias, seed=seed + shift) for shift in (0, 1))
    x = torch.randn(rows, inputs) * 4
    assert relative(PackedLinear(gate, up=up)(x), silu(gate(x)) * up(x)) < 1e-5


def test_gates_far_from_zero_are_open_or_shut():
    gate, up = layer(1, 1, bias=False, seed=1), layer(1, 1, bias=False, seed=1)
    gate.weight[:], up.weight[:] = 1, 1
    x = torch.tensor([[-1e30], [-200.0], [0.0], [200.0], [1e18]])
    torch.testing.assert_close(PackedLinear(gate, up=up)(x), silu(x) * x)
