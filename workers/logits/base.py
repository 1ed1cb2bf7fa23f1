"""What a logits processor is: it changes the rows of the slots that ask for it, and costs nothing when none does."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from protocol.plan import Sampling
from workers.transfer import index


@dataclass(frozen=True, slots=True)
class Rows:
    """Whose next tokens a batch of logits is about: row i about the one at ``positions[i]`` of the sequence in ``slots[i]``.

    On the device: ``index``, the slots, and ``positions``, int64 ``[n]``; ``history`` int32 ``[all slots, L]`` and
    ``prompt_len`` int64 ``[all slots]``. What stands before its position in its slot's history is a row's past; L is no less
    than any position. A slot may have several rows, at several positions.
    """

    slots: list[int]
    index: Tensor
    positions: Tensor
    history: Tensor
    prompt_len: Tensor

    def select(self, rows: list[int]) -> "Rows":
        """Some of them."""
        slots, at = [self.slots[row] for row in rows], index(rows, self.index.device)
        return Rows(slots, self.index[at], self.positions[at], self.history, self.prompt_len)


class Processor(ABC):
    """One way in which logits are changed. ``slots``: those that ask for it.

    Of a slot that asks, the fields of `Sampling` named in ``fields`` are kept in ``values``, float32 ``[slots]`` on the device.
    """

    fields: ClassVar[tuple[str, ...]] = ()

    def __init__(self, slots: int, device: torch.device) -> None:
        self.device = device
        self.slots: set[int] = set()
        self.values = {name: torch.zeros(slots, device=device) for name in self.fields}

    def assign(self, slot: int, sampling: Sampling) -> None:
        """From now on the slot's sequence has these parameters."""
        self.slots.discard(slot)
        if self.wanted(sampling):
            self.slots.add(slot)
            self.keep(slot, sampling)

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        """Change the rows that ask for it, perhaps in place: logits float32 ``[n, V]`` -> the same shape."""
        chosen = [row for row, slot in enumerate(rows.slots) if slot in self.slots] if self.slots else []
        if len(chosen) == len(rows.slots):
            return self.change(logits, rows)
        if chosen:
            at = index(chosen, logits.device)
            logits[at] = self.change(logits[at], rows.select(chosen))
        return logits

    @staticmethod
    @abstractmethod
    def wanted(sampling: Sampling) -> bool:
        """Whether these parameters ask for it."""

    def keep(self, slot: int, sampling: Sampling) -> None:
        """Remember what a slot asks for."""
        for name, values in self.values.items():
            values[slot] = getattr(sampling, name)

    @abstractmethod
    def change(self, logits: Tensor, rows: Rows) -> Tensor:
        """Change all rows: float32 ``[n, V]`` -> ``[n, V]``, perhaps in place."""
