"""What full KV blocks hold, so that a prompt that begins like an earlier one needn't be computed from its beginning.

A block is found by its whole prefix: by the block before it, whose turn it is to be found first, its salt and its tokens, all
compared and not only hashed, so that a collision can't hand out another prefix's KV.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Known:
    """A block whose content can be found; ``node`` names it as the parent of those that go on from it."""

    block: int
    node: int


_Key = tuple[int, str, tuple[int, ...]]


class PrefixIndex:
    """From ``(node of the block before, salt, tokens)`` to a block. The first block of a chain follows node 0."""

    def __init__(self) -> None:
        self._known: dict[_Key, Known] = {}
        self._keys: dict[int, _Key] = {}
        # Never used twice, so that nobody goes on from a block that meanwhile holds something else.
        self._last_node = 0

    def __contains__(self, block: int) -> bool:
        return block in self._keys

    def find(self, node: int, salt: str, tokens: list[int]) -> Known | None:
        return self._known.get((node, salt, tuple(tokens)))

    def add(self, node: int, salt: str, tokens: list[int], block: int) -> int:
        """``block`` holds these tokens now; returns its node, or that of the one that held them already."""
        key = (node, salt, tuple(tokens))
        known = self._known.get(key)
        if known is None:
            self._last_node += 1
            known = self._known[key] = Known(block, self._last_node)
            self._keys[block] = key
        return known.node

    def forget(self, block: int) -> None:
        """The block is to hold something else."""
        del self._known[self._keys.pop(block)]

    def clear(self) -> None:
        """The KV is gone."""
        self._known.clear()
        self._keys.clear()
