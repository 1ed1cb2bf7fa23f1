"""Adapters of packed layers against the plain form, and the promise that a row's output doesn't depend on its company."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import silu

from workers.adapted import AdaptedLinear, Share
from workers.linear import FORMATS, PackedLinear
from workers.packed_adapters import PackedAdapters, PackedShare

PLACES = 3
#: So many are compared at once: the sums of one may all but cancel, and then float32 has less of them than is asked for.
STEPS = 8
#: Output features of the layers that are one product: less than a vector, whole ones, across the borders of panels.
WIDTHS = st.sampled_from([(1,), (40,), (64, 32), (32, 16, 16), (70, 9, 9), (3, 2, 2), (50, 3, 40)])
GATED_WIDTHS = st.sampled_from([(1, 1), (16, 16), (40, 40), (77, 77)])

Weights = dict[int, tuple[Tensor, Tensor]]


class Adapted:
    """The same layers as one packed product and as torch's own, with the same adapters."""

    def __init__(self, inputs: int, widths: tuple[int, ...], rank: int, format: torch.dtype, *, gated: bool) -> None:
        torch.manual_seed(inputs + rank)
        self.rank, self.inputs, self.widths, self.gated = rank, inputs, widths, gated
        parts = [nn.Linear(inputs, width).requires_grad_(False) for width in widths]
        if gated:
            self.packed = PackedLinear(parts[0], format, up=parts[1])
        else:
            whole = nn.Linear(inputs, sum(widths)).requires_grad_(False)
            whole.weight[:], whole.bias[:] = torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])
            self.packed = PackedLinear(whole, format, widths=widths)
        self.share, self.plain_share = (
            PackedShare(PLACES, rank),
            Share(PLACES, rank, torch.float32, torch.device("cpu")),
        )
        self.adapters = PackedAdapters(self.packed, self.share)
        self.packed.adapt(self.adapters)
        self.plain = [AdaptedLinear(part, self.plain_share) for part in parts]
        for plain, part in zip(self.plain, parts, strict=True):
            # Rounded as the product is, so that only the adapters are compared.
            plain.base = PackedLinear(part, format)

    def put(self, place: int, weights: Weights) -> None:
        self.adapters.put(place, weights)
        for part, plain in enumerate(self.plain):
            plain.put(place, {0: weights[part]} if part in weights else {})

    def weights(self, rank: int, parts: Sequence[int]) -> Weights:
        return {part: (torch.randn(rank, self.inputs), torch.randn(self.widths[part], rank)) for part in parts}

    def __call__(self, x: Tensor, place: Tensor | None) -> Tensor:
        self.share.set(place)
        return self.packed(x)

    def expected(self, x: Tensor, place: Tensor | None) -> Tensor:
        self.plain_share.set(place)
        outputs = [plain(x[None])[0] for plain in self.plain]
        return silu(outputs[0]) * outputs[1] if self.gated else torch.cat(outputs, dim=1)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def places(rows: int, seed: int) -> Tensor:
    return torch.randint(-1, PLACES, (rows,), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 300),
    inputs=st.integers(1, 80),
    shape=st.one_of(WIDTHS.map(lambda widths: (widths, False)), GATED_WIDTHS.map(lambda widths: (widths, True))),
    rank=st.integers(1, 20),
    format=st.sampled_from(FORMATS),
    seed=st.integers(0, 99),
)
@example(
    rows=1, inputs=63, shape=((1, 1), True), rank=1, format=torch.float32, seed=0
)  # of one step hardly anything is left
def test_each_row_is_what_the_plain_form_makes_of_it(rows, inputs, shape, rank, format, seed):
    """Adapters of different ranks, one of which leaves layers as they are; rows of none, whole steps of one."""
    widths, gated = shape
    layer = Adapted(inputs, widths, rank, format, gated=gated)
    every = range(len(widths))
    layer.put(0, layer.weights(rank, every))
    layer.put(1, layer.weights(rank, every))
    layer.put(1, layer.weights(1 + rank // 2, every[1:] or every))
    layer.put(2, layer.weights(rank, every[:1]))
    steps = torch.randn(STEPS, rows, inputs)
    for place in (places(rows, seed), torch.full((rows,), 1), torch.full((rows,), -1), None):
        ours, theirs = (torch.cat([form(x, place) for x in steps]) for form in (layer, layer.expected))
        assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_bits_in_any_company_and_wherever_its_adapter_lies(format, threads, gated):
    """Rows cross the borders of tiles (4, 6 or 8), runs (8) and chunks (128); the layer is large enough for several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        layer = Adapted(256, (200, 200) if gated else (200, 30, 30), 5, format, gated=gated)
        adapters = [layer.weights(5, range(len(layer.widths))) for _ in range(PLACES)]
        for place, weights in enumerate(adapters):
            layer.put(place, weights)
        x, place = torch.randn(205, 256), places(205, seed=7)
        alone = torch.cat([layer(row[None], own[None]) for row, own in zip(x, place, strict=True)])
        assert torch.equal(alone[place < 0], layer(x, None)[place < 0]), "a row of no adapter loses nothing"
        for first, last in [(0, 205), (0, 70), (5, 18), (90, 188), (204, 205)]:
            assert torch.equal(layer(x[first:last], place[first:last]), alone[first:last])
        for new, weights in enumerate(reversed(adapters)):
            layer.put(new, weights)
        assert torch.equal(layer(x, torch.where(place < 0, -1, PLACES - 1 - place)), alone)
    finally:
        torch.set_num_threads(before)


def test_a_step_of_other_rows_is_refused():
    layer = Adapted(8, (8,), 2, torch.float32, gated=False)
    with pytest.raises(ValueError, match="3 rows of a step of 4 tokens"):
        layer(torch.randn(3, 8), torch.zeros(4, dtype=torch.int64))
