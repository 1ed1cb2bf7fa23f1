"""Packed linear layers against torch's own, and the promise that a row's output doesn't depend on its company."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear, silu

from tests.workers.machines import compile_for
from workers.linear import FORMATS, GATES, INT8_MAX, PackedLinear, kernel

SIZES = st.integers(1, 80)
#: Inputs of a row that share a scale.
GROUP = 64


def layer(inputs: int, outputs: int, *, bias: bool, seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Where sums come out near 0, of what was added, which is about 1."""
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1))


@settings(max_examples=200, deadline=None)
@given(rows=st.integers(1, 70), inputs=SIZES, outputs=SIZES, bias=st.booleans(), seed=st.integers(0, 99))
def test_float32_is_torchs_linear(rows, inputs, outputs, bias, seed):
    module = layer(inputs, outputs, bias=bias, seed=seed)
    x = torch.randn(rows, inputs)
    assert relative(PackedLinear(module)(x), module(x)) < 1e-5


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 70), inputs=SIZES, outputs=SIZES, bias=st.booleans(), seed=st.integers(0, 99))
def test_bfloat16_is_torchs_linear_on_the_rounded_weight(rows, inputs, outputs, bias, seed):
    module = layer(inputs, outputs, bias=bias, seed=seed)
    x = torch.randn(rows, inputs)
    rounded = module.weight.bfloat16().float()
    assert relative(PackedLinear(module, torch.bfloat16)(x), linear(x, rounded, module.bias)) < 1e-5


def rounded_linear(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """What int8 means, in float64 where the kernel is exact or sums in float32."""
    scale = module.weight.abs().amax(dim=1) / INT8_MAX
    weight = (module.weight / scale[:, None]).round().double()
    out = torch.zeros(len(x), module.out_features).double()
    for inputs, weights in zip(x.split(GROUP, dim=1), weight.split(GROUP, dim=1), strict=True):
        peak = inputs.abs().amax(dim=1, keepdim=True)
        # A number over a tensor would be the number times its reciprocal, rounded twice.
        inverse = torch.tensor(float(INT8_MAX)) / peak
        out += (inputs * inverse).round().double() @ weights.T * (peak / INT8_MAX)
    out *= scale
    return (out if module.bias is None else out + module.bias).float()


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 70),
    inputs=st.integers(1, 300) | st.integers(1, 9).map(lambda groups: groups * GROUP),
    outputs=SIZES,
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_int8_is_a_product_of_whole_numbers_by_groups(rows, inputs, outputs, bias, seed):
    module, up = (layer(inputs, outputs, bias=bias, seed=seed + shift) for shift in (0, 1))
    x = torch.randn(rows, inputs) * torch.rand(rows, 1).exp2()
    assert relative(PackedLinear(module, torch.int8)(x), rounded_linear(module, x)) < 1e-5
    gated = silu(rounded_linear(module, x)) * rounded_linear(up, x)
    assert relative(PackedLinear(module, torch.int8, up=up)(x), gated) < 1e-5


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 70),
    outputs=SIZES,
    format=st.sampled_from(FORMATS),
    alias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_residual_is_added_where_the_product_is_written(rows, outputs, format, alias, seed):
    module = layer(40, outputs, bias=True, seed=seed)
    packed, x, residual = PackedLinear(module, format), torch.randn(rows, 40), torch.randn(rows, outputs)
    expected = residual + packed(x)
    y = residual if alias else torch.empty(rows, outputs)
    kernel().linear(packed.address, x.data_ptr(), rows, residual.data_ptr(), y.data_ptr(), None, None, 2)
    assert torch.equal(y, expected)


def test_int8_is_near_float32():
    module, x = layer(576, 960, bias=True, seed=1), torch.randn(50, 576)
    assert 1e-3 < relative(PackedLinear(module, torch.int8)(x), module(x)) < 1e-2


def test_a_group_of_zeros_and_numbers_that_are_none_have_scales_too():
    module = layer(3 * GROUP, 40, bias=True, seed=1)
    packed = PackedLinear(module, torch.int8)
    x = torch.randn(5, 3 * GROUP)
    x[1], x[2, :GROUP] = 0, 0
    x[3, 2], x[4, 2] = torch.nan, torch.inf
    out = packed(x)
    assert torch.equal(out[1], module.bias)
    assert relative(out[2], module(x[2])) < 1e-2
    assert out[:3].isfinite().all()
    assert not out[3:].isfinite().any()


@pytest.fixture
def kernel_of(monkeypatch):
    """Has the kernel compiled for another CPU."""

    def choose(machine: str, needs: str) -> None:
        compile_for(machine, needs, monkeypatch)
        kernel.cache_clear()

    yield choose
    monkeypatch.undo()
    kernel.cache_clear()


@pytest.mark.parametrize(
    ("machine", "needs", "tolerance"),
    [
        ("icelake-server", "avx512_vnni", 0),
        # Without them in the CPU the system refuses these registers.
        ("icelake-server -mamx-tile -mamx-int8", "avx512_vnni", 0),
        ("haswell", "avx2", 0),
        ("x86-64", "sse2", 1e-6),
    ],
)
def test_int8_does_not_depend_on_the_cpu(kernel_of, machine, needs, tolerance):
    """But for multiply-adds that are rounded twice where there are no fused ones. With and without a group that isn't whole."""

    def products() -> list[torch.Tensor]:
        return [
            PackedLinear(gate, torch.int8, up=up)(x[:rows])
            for gate, other, x in cases
            for up in (None, other)
            for rows in (1, 16, 17, 41)
        ]

    cases = [
        (*(layer(inputs, 333, bias=True, seed=seed) for seed in (1, 2)), torch.randn(41, inputs))
        for inputs in (603, 6 * GROUP)
    ]
    expected = products()
    kernel_of(machine, needs)
    for ours, theirs in zip(products(), expected, strict=True):
        assert relative(ours, theirs) <= tolerance


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_bits_in_any_company(format, threads):
    """Rows cross the borders of tiles (4, 6 or 12) and chunks (132); the layer is large enough for several threads."""
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
    with pytest.raises(ValueError, match="only float32 weights"):
        PackedLinear(layer(8, 8, bias=False, seed=1).bfloat16())


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 70),
    inputs=SIZES,
    outputs=SIZES,
    bias=st.booleans(),
    seed=st.integers(0, 99),
    through=st.sampled_from(GATES),
)
def test_a_gated_layer_is_the_gate_times_up(rows, inputs, outputs, bias, seed, through):
    gate, up = (layer(inputs, outputs, bias=bias, seed=seed + shift) for shift in (0, 1))
    x = torch.randn(rows, inputs) * 4
    assert relative(PackedLinear(gate, up=up, gate=through)(x), through(gate(x)) * up(x)) < 1e-5


@pytest.mark.parametrize("through", GATES)
def test_gates_far_from_zero_are_open_or_shut(through):
    gate, up = layer(1, 1, bias=False, seed=1), layer(1, 1, bias=False, seed=1)
    gate.weight[:], up.weight[:] = 1, 1
    x = torch.tensor([[-1e30], [-200.0], [0.0], [200.0], [1e18]])
    torch.testing.assert_close(PackedLinear(gate, up=up, gate=through)(x), through(x) * x)
