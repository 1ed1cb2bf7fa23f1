"""Rows of logits as the runner makes them, from what stands before each."""

import torch

from workers.logits import Rows


def rows(slots: list[int], pasts: list[tuple[list[int], int]], fill: int = 0) -> Rows:
    """Of each slot its tokens so far and how many of them are its prompt; ``fill`` stands where nothing has been yet.

    A slot that comes several times has the longest of its pasts.
    """
    longest = max(len(past) for past, _ in pasts)
    history = torch.full((max(slots) + 1, longest), fill, dtype=torch.int32)
    prompt_len = torch.zeros(max(slots) + 1, dtype=torch.int64)
    for slot, (past, length) in sorted(zip(slots, pasts, strict=True), key=lambda pair: len(pair[1][0])):
        history[slot, : len(past)] = torch.tensor(past, dtype=torch.int32)
        prompt_len[slot] = length
    positions = torch.tensor([len(past) for past, _ in pasts])
    return Rows(slots, torch.tensor(slots), positions, history, prompt_len)
