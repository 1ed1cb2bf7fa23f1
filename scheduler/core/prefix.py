"""What full KV blocks hold, so that a prompt that begins like an earlier one needn't be computed from its beginning.

A block is found by its whole prefix: by the block before it, whose turn it is to be found first, its salt and its tokens, all
compared and not only hashed, so that a collision can't hand out another prefix's KV.
"""

_Key = tuple[int, str, tuple[int, ...]]


class PrefixIndex:
    """From ``(node of the block before, salt, tokens)`` to a block, whose ``node`` then names it as the parent of others.

    The first block of a chain follows node 0.
    """

    def __init__(self, num_blocks: int) -> None:
        self._blocks: dict[_Key, int] = {}
        self._keys: list[_Key | None] = [None] * num_blocks
        self._nodes = [0] * num_blocks
        # Never used twice, so that nobody goes on from a block that meanwhile holds something else.
        self._last_node = 0

    def __contains__(self, block: int) -> bool:
        return self._keys[block] is not None

    def find(self, node: int, salt: str, tokens: list[int]) -> int | None:
        return self._blocks.get((node, salt, tuple(tokens)))

    def node(self, block: int) -> int:
        """Of a block that can be found."""
        return self._nodes[block]

    def add(self, node: int, salt: str, tokens: list[int], block: int) -> int:
        """``block`` holds these tokens now; returns its node, or that of the one that held them already."""
        if block in self:  # siblings share it
            return self._nodes[block]
        key = (node, salt, tuple(tokens))
        known = self._blocks.setdefault(key, block)
        if known == block:
            self._last_node += 1
            self._keys[block] = key
            self._nodes[block] = self._last_node
        return self._nodes[known]

    def forget(self, block: int) -> None:
        """The block is to hold something else."""
        key = self._keys[block]
        assert key is not None
        self._keys[block] = None
        del self._blocks[key]

    def clear(self) -> None:
        """The KV is gone."""
        self._blocks.clear()
        self._keys = [None] * len(self._keys)
