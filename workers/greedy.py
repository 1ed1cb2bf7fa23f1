"""The likeliest tokens."""

import math

from torch import Tensor

#: Logits of which only the maximum is looked for at first, and how few of them make that worth it.
_PART, _LEAST = 256, 32


def greedy(logits: Tensor) -> Tensor:
    """Of each row the likeliest token, the first of equals: logits ``[n, V]`` -> int64 ``[n]``.

    What `argmax` gives; on the CPU it keeps track of places one by one, where maxima alone take several numbers at a time.
    """
    part = math.gcd(logits.shape[-1], _PART)
    if logits.device.type != "cpu" or part < _LEAST:
        return logits.argmax(dim=-1)
    parts = logits.unflatten(-1, (-1, part))
    best = parts.amax(dim=-1).argmax(dim=-1, keepdim=True)
    within = parts.take_along_dim(best[..., None], dim=1)[:, 0].argmax(dim=-1, keepdim=True)
    return (best * part + within)[:, 0]
