"""The pool of paged KV blocks (Kwon et al., "Efficient Memory Management for LLM Serving with PagedAttention", SOSP'23)."""

from collections import OrderedDict

from scheduler.core.family import PromptBlocks
from scheduler.core.prefix import PrefixIndex
from scheduler.core.sequence import Sequence


class OutOfBlocks(Exception):
    """The pool holds fewer free blocks than were asked for; nothing was allocated."""


class BlockPool:
    """Hands out physical block numbers ``0 .. num_blocks - 1``; a block holds ``block_size`` tokens of every layer.

    With ``prefix_cache`` a full block can be shared by all sequences that begin with the same tokens, those of one tenant only
    except for public prefixes. A block that nobody uses any more keeps its content until it is needed, the least
    recently used one first, and of a sequence the last first.

    With or without it, sequences of one family share the blocks that their prompt fills. The one that it ends in, which each goes
    on to write in, is copied instead.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = False) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs at least one block of at least one token, not {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefixes = PrefixIndex(num_blocks) if prefix_cache else None
        self._free = list(range(num_blocks - 1, -1, -1))
        self._users = [0] * num_blocks
        self._fillings = [0] * num_blocks
        self._unused: OrderedDict[int, None] = OrderedDict()
        self._public: list[list[int]] = []

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses."""
        return len(self._free) + len(self._unused)

    @property
    def num_kept(self) -> int:
        """Blocks that nobody uses but whose content may be."""
        return len(self._unused)

    def num_freed_by(self, sequence: Sequence) -> int:
        """How many blocks only this sequence uses."""
        return sum(1 for block in sequence.blocks if self._users[block] == 1)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks ``tokens`` tokens fill."""
        return -(-tokens // self.block_size)

    def share(self, prefix: list[int]) -> None:
        """All tenants may share the blocks of this prefix; to be said before anything runs."""
        self._public.append(prefix)

    def public_len(self, tokens: list[int]) -> int:
        """With how many tokens of a public prefix these begin."""
        return max((_common_len(tokens, prefix) for prefix in self._public), default=0)

    def free(self, blocks: list[int], *, keep: bool = False) -> None:
        """Give blocks back; ``keep``: with what they hold, for as long as may be. Raises ValueError for one that is free."""
        for block in reversed(blocks):
            if not self._users[block]:
                raise ValueError(f"block {block} is free already")
            self._users[block] -= 1
            if self._users[block]:
                continue
            if keep or (self._prefixes is not None and block in self._prefixes):
                self._unused[block] = None
            else:
                self._free.append(block)

    def grow(self, sequence: Sequence, count: int) -> None:
        """Give a sequence ``count`` more blocks, the most recently freed first. Raises OutOfBlocks."""
        if count > self.num_free:
            raise OutOfBlocks(f"{count} blocks wanted, {self.num_free} free of {self.num_blocks}")
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._users[block] = 1
            self._fillings[block] += 1
            sequence.blocks.append(block)
        sequence.room = len(sequence.blocks) * self.block_size

    def prompt_of(self, sequence: Sequence) -> PromptBlocks:
        """Where a sequence's prompt, which is computed, lies from now on."""
        blocks = sequence.blocks[: self.blocks_for(sequence.prompt_len)]
        return PromptBlocks(blocks, [self._fillings[block] for block in blocks])

    def shared(self, sequence: Sequence) -> list[int] | None:
        """The blocks that a sequence can have from its family; None when some of its prompt isn't there."""
        family = sequence.family
        if family is None or family.prompt is None or sequence.sampling.prompt_logprobs is not None:
            return None
        full = sequence.fork_len // self.block_size
        blocks = family.prompt.blocks[:full]
        return blocks if all(map(self._is_intact, blocks, family.prompt.fillings)) else None

    def num_used(self, blocks: list[int]) -> int:
        """How many of these are in use."""
        return sum(1 for block in blocks if self._users[block])

    def fork(self, sequence: Sequence, blocks: list[int]) -> None:
        """Let a sequence that has no blocks share these, which its prompt fills."""
        for block in blocks:
            self._unused.pop(block, None)
            self._users[block] += 1
            sequence.blocks.append(block)
        sequence.computed = sequence.room = len(blocks) * self.block_size
        self.remember(sequence, sequence.computed)

    def edge(self, sequence: Sequence) -> int | None:
        """The block that holds what of its prompt a sequence that has forked lacks; None when it lacks nothing, or it is gone."""
        at, family = len(sequence.blocks), sequence.family
        if family is None or family.prompt is None or sequence.fork_len <= at * self.block_size:
            return None
        block = family.prompt.blocks[at]
        return block if self._is_intact(block, family.prompt.fillings[at]) else None

    def reuse(self, sequence: Sequence) -> None:
        """Add to a sequence's blocks those that hold its beginning, as far as it can do without computing it."""
        if self._prefixes is None:
            return
        most = sequence.reusable_len // self.block_size
        while sequence.known_blocks < most:
            block = self._prefixes.find(sequence.node, *self._content(sequence, sequence.known_blocks))
            if block is None:
                break
            self._unused.pop(block, None)
            self._users[block] += 1
            sequence.blocks.append(block)
            sequence.known_blocks += 1
            sequence.node = self._prefixes.node(block)
        sequence.computed = sequence.room = sequence.known_blocks * self.block_size

    def cached_len(self, sequence: Sequence) -> int:
        """How many tokens the cache would spare a sequence that isn't here yet."""
        if self._prefixes is None:
            return 0
        sequence.public_len = self.public_len(sequence.tokens)
        node, known = 0, 0
        for index in range(sequence.reusable_len // self.block_size):
            block = self._prefixes.find(node, *self._content(sequence, index))
            if block is None:
                break
            node, known = self._prefixes.node(block), index + 1
        return known * self.block_size

    def remember(self, sequence: Sequence, computed: int) -> None:
        """The first ``computed`` positions of a sequence are computed: its full blocks can be found from now on."""
        if self._prefixes is None:
            return
        while sequence.known_blocks < computed // self.block_size:
            index = sequence.known_blocks
            salt, tokens = self._content(sequence, index)
            sequence.node = self._prefixes.add(sequence.node, salt, tokens, sequence.blocks[index])
            sequence.known_blocks += 1

    def forget_content(self) -> None:
        """The KV is lost; nobody may hold a block."""
        self._fillings = [filling + 1 for filling in self._fillings]
        self._free += self._unused
        self._unused.clear()
        if self._prefixes is not None:
            self._prefixes.clear()

    def _content(self, sequence: Sequence, index: int) -> tuple[str, list[int]]:
        """The salt and the tokens of a sequence's block: what isn't wholly public is its tenant's."""
        end = (index + 1) * self.block_size
        salt = sequence.public_salt if end <= sequence.public_len else sequence.salt
        return salt, sequence.tokens[end - self.block_size : end]

    def _evict(self) -> int:
        block, _ = self._unused.popitem(last=False)
        if self._prefixes is not None and block in self._prefixes:
            self._prefixes.forget(block)
        return block

    def _is_intact(self, block: int, filling: int) -> bool:
        """Whether a block holds what it held when it had been handed out so often."""
        return self._fillings[block] == filling


def _common_len(one: list[int], other: list[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
