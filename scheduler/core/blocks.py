"""The pool of paged KV blocks (Kwon et al., "Efficient Memory Management for LLM Serving with PagedAttention", SOSP'23)."""


class OutOfBlocks(Exception):
    """The pool holds fewer free blocks than were asked for; nothing was allocated."""


class BlockPool:
    """Hands out physical block numbers ``0 .. num_blocks - 1``; a block holds ``block_size`` tokens of every layer."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs at least one block of at least one token, not {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_free = bytearray(b"\1" * num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks ``tokens`` tokens fill."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks, the most recently freed first. Raises OutOfBlocks."""
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks wanted, {len(self._free)} free of {self.num_blocks}")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._is_free[block] = False
        return taken

    def free(self, blocks: list[int]) -> None:
        """Give blocks back. Raises ValueError for one that is already free."""
        for block in reversed(blocks):
            if self._is_free[block]:
                raise ValueError(f"block {block} is free already")
            self._is_free[block] = True
            self._free.append(block)
