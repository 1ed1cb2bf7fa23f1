"""Batched sampling: every row with its own parameters, and draws that depend on nothing but (seed, position).

The filters follow transformers' logits processors in meaning and order: temperature, top-k, top-p, min-p.
"""

import torch
from torch import Tensor

from protocol.plan import Sampling

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


def filter_top_k_top_p(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Set what falls outside each row's top-k, then top-p, to -inf; logits ``[n, V]``, the rest ``[n]``; 0 and 1 are off."""
    ordered, index = logits.sort(dim=-1, descending=True)
    last_kept = torch.where(top_k > 0, top_k, logits.shape[-1]).clamp(max=logits.shape[-1]) - 1
    ordered = ordered.masked_fill(ordered < ordered.gather(-1, last_kept[:, None]), -torch.inf)
    probabilities = ordered.softmax(dim=-1)
    mass_above = probabilities.cumsum(dim=-1) - probabilities
    # With top_p = 1 rounding in the sum could cut the tail, so such rows are left alone.
    outside = (mass_above >= top_p[:, None]) & (top_p[:, None] < 1)
    outside[:, 0] = False
    return torch.empty_like(logits).scatter_(-1, index, ordered.masked_fill(outside, -torch.inf))


def filter_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Set tokens less likely than ``min_p`` times the likeliest to -inf; logits ``[n, V]``, min_p ``[n]``; 0 is off."""
    floor = logits.amax(dim=-1) + min_p.log()
    return logits.masked_fill(logits < floor[:, None], -torch.inf)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Invert each row's cumulative distribution at its uniform; logits ``[n, V]``, uniforms float64 ``[n]`` -> int64 ``[n]``."""
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    target = uniforms * cumulative[:, -1]
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


class Sampler:
    """Sampling parameters of every slot, on the device, and the draw itself."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._temperature = torch.zeros(slots, device=device)
        self._top_k = torch.zeros(slots, dtype=torch.int64, device=device)
        self._top_p = torch.ones(slots, device=device)
        self._min_p = torch.zeros(slots, device=device)
        self._seed = torch.zeros(slots, dtype=torch.int64, device=device)
        self._parameters = [Sampling()] * slots

    def assign(self, slot: int, sampling: Sampling) -> None:
        """From now on the slot draws with these parameters."""
        self._parameters[slot] = sampling
        if sampling.temperature:
            self._temperature[slot] = sampling.temperature
            self._top_k[slot] = sampling.top_k
            self._top_p[slot] = sampling.top_p
            self._min_p[slot] = sampling.min_p
            self._seed[slot] = sampling.seed

    def sample(self, logits: Tensor, slots: list[int], positions: Tensor) -> Tensor:
        """Draw one token per row: logits ``[n, V]``; ``positions``, int64 ``[n]``, are those the tokens will stand at.

        Returns int64 ``[n]``.
        """
        tokens = logits.argmax(dim=-1)
        rows = [row for row, slot in enumerate(slots) if self._parameters[slot].temperature]
        if rows:
            tokens[rows] = self._draw(logits[rows], [slots[row] for row in rows], positions[rows])
        return tokens

    def _draw(self, logits: Tensor, slots: list[int], positions: Tensor) -> Tensor:
        at = torch.tensor(slots, device=logits.device)
        logits = logits.float()
        # Shifted first: a tiny temperature then drives the rest to -inf, never the likeliest to inf.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / self._temperature[at][:, None]
        used = [self._parameters[slot] for slot in slots]
        cut = [row for row, parameters in enumerate(used) if parameters.top_k > 0 or parameters.top_p < 1]
        if cut:
            logits[cut] = filter_top_k_top_p(logits[cut], self._top_k[at[cut]], self._top_p[at[cut]])
        if any(parameters.min_p for parameters in used):
            logits = filter_min_p(logits, self._min_p[at])
        return draw(logits, uniform(self._seed[at], positions))
