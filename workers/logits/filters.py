"""What narrows or flattens a distribution that is drawn from. Meaning and order are those of transformers' logits warpers."""

import torch
from torch import Tensor

from protocol.plan import Sampling
from workers.logits.base import Processor, Rows


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


def filter_typical(logits: Tensor, typical_p: Tensor) -> Tensor:
    """Set all but the most typical tokens that together reach ``typical_p``, ``[n]``, to -inf; logits ``[n, V]``.

    Typical is whose information is near the entropy (Meister et al., "Locally Typical Sampling", TACL 2023).
    """
    logprobs = logits.log_softmax(dim=-1)
    probabilities = logprobs.exp()
    # Not nansum, which sums a row in another order when it is alone.
    entropy = -(probabilities * logprobs).nan_to_num().cumsum(dim=-1)[:, -1:]
    distance = (-logprobs - entropy).abs()
    ordered, index = distance.sort(dim=-1)
    mass = probabilities.gather(-1, index).cumsum(dim=-1)
    last_kept = (mass < typical_p[:, None]).sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return logits.masked_fill(distance > ordered.gather(-1, last_kept), -torch.inf)


class Temperature(Processor):
    """Divides logits. Source: transformers' TemperatureLogitsWarper."""

    fields = ("temperature",)

    @staticmethod
    def wanted(sampling: Sampling) -> bool:
        return sampling.temperature not in {0, 1}

    def change(self, logits: Tensor, rows: Rows) -> Tensor:
        # Shifted first: a tiny temperature then drives the rest to -inf, never the likeliest to inf.
        temperature = self.values["temperature"][rows.index].clamp(min=torch.finfo(torch.float32).tiny)
        return (logits - logits.amax(dim=-1, keepdim=True)) / temperature[:, None]


class TopKTopP(Processor):
    """Both in one, for they share a sort. Source: transformers' TopKLogitsWarper and TopPLogitsWarper."""

    fields = ("top_k", "top_p")

    @staticmethod
    def wanted(sampling: Sampling) -> bool:
        return bool(sampling.temperature) and (sampling.top_k > 0 or sampling.top_p < 1)

    def change(self, logits: Tensor, rows: Rows) -> Tensor:
        top_k, top_p = (self.values[name][rows.index] for name in self.fields)
        return filter_top_k_top_p(logits, top_k.long(), top_p)


class MinP(Processor):
    """Source: transformers' MinPLogitsWarper."""

    fields = ("min_p",)

    @staticmethod
    def wanted(sampling: Sampling) -> bool:
        return bool(sampling.temperature) and sampling.min_p > 0

    def change(self, logits: Tensor, rows: Rows) -> Tensor:
        return filter_min_p(logits, self.values["min_p"][rows.index])


class TypicalP(Processor):
    """Source: transformers' TypicalLogitsWarper."""

    fields = ("typical_p",)

    @staticmethod
    def wanted(sampling: Sampling) -> bool:
        return bool(sampling.temperature) and sampling.typical_p < 1

    def change(self, logits: Tensor, rows: Rows) -> Tensor:
        return filter_typical(logits, self.values["typical_p"][rows.index])
