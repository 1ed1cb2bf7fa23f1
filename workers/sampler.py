"""Batched sampling: every row with its own parameters, and draws that depend on nothing but (seed, position)."""

import torch
from torch import Tensor

from protocol.plan import Sampling
from workers.greedy import greedy
from workers.logits import Rows, processors
from workers.transfer import index

_MASK = 0xFFFFFFFF
_ROUND_KEYS = (0x9E3779B9, 0xBB67AE85)
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)


def philox4x32(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11) on int64 tensors of 32-bit words.

    ``counter`` is 4 and ``key`` 2 tensors of one shape; returns 4 words of that shape. A counter-based generator holds no
    state: the same key and counter give the same words on any device, in any batch.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A 32 x 32 bit product may wrap int64's sign, but its bits are right: mask after the shift.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _MASK, (product1 >> 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _MASK, high0 ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + _ROUND_KEYS[0]) & _MASK, (k1 + _ROUND_KEYS[1]) & _MASK
    return [c0, c1, c2, c3]


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """One float64 in [0, 1) per row, 53 bits of it; ``seed`` and ``position`` int64 ``[n]``."""
    zero = torch.zeros_like(position)
    words = philox4x32([position & _MASK, position >> 32, zero, zero], [seed & _MASK, (seed >> 32) & _MASK])
    return ((words[0] >> 5).double() * 2.0**26 + (words[1] >> 6).double()) * 2.0**-53


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Invert each row's cumulative distribution at its uniform; logits ``[n, V]``, uniforms float64 ``[n]`` -> int64 ``[n]``."""
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    target = uniforms * cumulative[:, -1]
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


class Sampler:
    """What every slot's tokens are drawn with, and the draw itself."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._processors = processors(slots, device)
        self._seed = torch.zeros(slots, dtype=torch.int64, device=device)
        self._drawn: set[int] = set()
        self._plain = set(range(slots))

    def assign(self, slot: int, sampling: Sampling) -> None:
        """From now on the slot's sequence has these parameters."""
        for processor in self._processors:
            processor.assign(slot, sampling)
        self._drawn.discard(slot)
        if sampling.temperature:
            self._drawn.add(slot)
            self._seed[slot] = sampling.seed
        self._plain.discard(slot)
        if not sampling.temperature and not any(slot in processor.slots for processor in self._processors):
            self._plain.add(slot)

    def sample(self, logits: Tensor, rows: Rows) -> Tensor:
        """One token per row, for its position: logits ``[n, V]`` -> int64 ``[n]``."""
        tokens = greedy(logits)
        others = [row for row, slot in enumerate(rows.slots) if slot not in self._plain]
        if others:
            at = index(others, logits.device)
            tokens[at] = self._choose(logits[at], rows.select(others))
        return tokens

    def process(self, logits: Tensor, rows: Rows) -> Tensor:
        """What each row's token is drawn from: logits ``[n, V]``, perhaps changed in place -> float32 ``[n, V]``."""
        logits = logits.float()
        for processor in self._processors:
            logits = processor.apply(logits, rows)
        return logits

    def _choose(self, logits: Tensor, rows: Rows) -> Tensor:
        logits = self.process(logits, rows)
        tokens = greedy(logits)
        drawn = [row for row, slot in enumerate(rows.slots) if slot in self._drawn]
        if drawn:
            at = index(drawn, logits.device)
            uniforms = uniform(self._seed[rows.index[at]], rows.positions[at])
            tokens[at] = draw(logits[at], uniforms)
        return tokens
